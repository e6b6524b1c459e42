# Each target sets up what it needs, from the package registries alone.
PYTHON ?= python3
.PHONY: demo test test-floor test-long lint site clean

demo: .venv/ready
	.venv/bin/python examples/quickstart.py

test: .venv/ready
	.venv/bin/python -m pytest -n auto --dist loadgroup

test-floor: .venv-floor/ready  # the oldest supported releases
	.venv-floor/bin/python -m pytest -n auto --dist loadgroup

test-long: .venv/ready
	.venv/bin/python -m pytest -m long

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

site: .venv/ready  # into site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

.venv/ready: constraints/newest.txt
.venv/ready: EXTRAS = test,docs
.venv-floor/ready: constraints/floor.txt
.venv-floor/ready: EXTRAS = test
.venv/ready .venv-floor/ready: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check -c $(filter constraints/%,$^) -e ".[$(EXTRAS)]"
	touch $@

clean:
	rm -rf .venv .venv-floor out site
