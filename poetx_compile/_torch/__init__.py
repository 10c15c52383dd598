"""All private torch API that this package leans on, in one place; ``tests/_torch`` pins it."""
