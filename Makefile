.PHONY: check format test

check:
	ruff check .
	ruff format --check .
	mypy
	lint-imports
	codespell
	python tools/check_file_size.py

format:
	ruff check --fix .
	ruff format .

test:
	pytest
