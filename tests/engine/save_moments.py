"""The moments of a save at which the files are different, to be killed at."""

from collections.abc import Callable

from covft.engine import checkpoint_hook


class SaveMoments:
    """Calls ``visit`` with a name before and after what a save does.

    Args:
        visit: What to call.
        write: The function of ``checkpoint_hook`` that saves.
        steps: Owner and name of functions that change files, and what to call them.
    """

    def __init__(
        self,
        visit: Callable[[str], None],
        *,
        write: str,
        steps: dict[str, tuple[object, str]],
    ) -> None:
        self._visit = visit
        self._is_saving = False
        for label, (owner, name) in steps.items():
            self._wrap(owner, name, label)
        save = getattr(checkpoint_hook, write)

        def traced_save(*args, **kwargs):
            self._is_saving = True
            path = save(*args, **kwargs)
            self._is_saving = False
            return path

        setattr(checkpoint_hook, write, traced_save)

    def moment(self, name: str) -> None:
        """Visit a moment, if something is being saved."""
        if self._is_saving:
            self._visit(name)

    def _wrap(self, owner: object, name: str, label: str) -> None:
        function = getattr(owner, name)

        def traced(*args, **kwargs):
            self.moment(f"before {label}")
            result = function(*args, **kwargs)
            self.moment(f"after {label}")
            return result

        setattr(owner, name, traced)
