.PHONY: check format test

check:
	ruff check .
	ruff format --check .
	mypy
	lint-imports
	codespell
	@long=$$(git ls-files '*.py' | xargs wc -l | awk '$$2 != "total" && $$1 > 500'); \
	if [ -n "$$long" ]; then echo "files over 500 lines:"; echo "$$long"; exit 1; fi

format:
	ruff check --fix .
	ruff format .

test:
	pytest
