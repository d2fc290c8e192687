"""What needs no model starts at once: torch and transformers take seconds to import."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["measured", "report", "prepare", "check_data", "chosen"])
def test_reports_and_checks_of_data_import_no_torch(module: str) -> None:
    script = f"import sys, covft.evaluation.{module}; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
