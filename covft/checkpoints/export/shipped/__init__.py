"""Modules that exported folders get beside the package's own: see ``export.bundle``.

They are ordinary modules here; in a folder their imports are relative.
"""
