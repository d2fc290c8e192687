"""Configs of other frameworks, read as this one's."""

from covft.interop.xtuner import ImportedConfig, import_xtuner

__all__ = ["ImportedConfig", "import_xtuner"]
