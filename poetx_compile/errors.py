"""The one exception and the one warning category of this package."""


class PoetxError(RuntimeError):
    """Something that cannot be done, with what to do instead. Raised before any weight is touched."""


class PoetxWarning(UserWarning):
    """Training goes on, but not as the user may expect."""
