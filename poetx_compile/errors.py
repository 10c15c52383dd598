"""The one exception and the one warning category of this package."""


class PoetxError(RuntimeError):
    """Something that cannot be done, with what to do instead. Raised before any weight is touched.

    What is raised while ``torch.compile`` compiles arrives as ``torch._dynamo.exc.BackendCompilerFailed``, which quotes it.
    """


class PoetxWarning(UserWarning):
    """Training goes on, but not as the user may expect."""
