"""What can go wrong without being anybody's mistake."""


class SourceUnreachableError(ConnectionError):
    """A package index or model hub didn't deliver; another source may."""
