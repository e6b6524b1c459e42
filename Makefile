# Each target sets up what it needs, from the package registries alone.
PYTHON ?= python3
WORLDS = examples/worlds/sdxl=32 examples/worlds/sana=32 examples/worlds/wan=64 examples/worlds/zimage=32
.PHONY: demo studio test test-floor test-long test-studio lint site wheel clean

demo: .venv/ready
	.venv/bin/python examples/quickstart.py

studio: .venv/studio-ready  # a page at http://127.0.0.1:7860, on the small worlds
	.venv/bin/dti studio --dtype float32 --models $(WORLDS)

test: .venv/ready
	.venv/bin/python -m pytest -n auto --dist loadgroup

test-floor: .venv-floor/ready  # the oldest supported releases
	.venv-floor/bin/python -m pytest -n auto --dist loadgroup

test-long: .venv/ready
	.venv/bin/python -m pytest -m long

test-studio: .venv/studio-ready
	command -v chromium || (apt-get update && apt-get install --yes --no-install-recommends chromium)
	.venv/bin/python -m pytest tests/studio -m studio

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

site: .venv/ready  # into site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

wheel: .venv/ready .venv-build/ready .venv-wheel/ready  # built, checked, and used where only the declared dependencies are
	rm -rf dist
	.venv-build/bin/python -m build --no-isolation --outdir dist
	.venv-build/bin/twine check --strict dist/*
	.venv-wheel/bin/pip install --quiet --disable-pip-version-check --no-deps --force-reinstall dist/*.whl
	.venv-wheel/bin/pip check --disable-pip-version-check
	.venv-wheel/bin/python -I .ci/use_wheel.py
	cd .ci && env -u MYPYPATH ../.venv/bin/mypy --config-file= --strict --allow-untyped-calls --cache-dir ../.mypy_cache/wheel \
		--python-executable ../.venv-wheel/bin/python use_wheel.py
	ls -l dist

.venv/studio-ready: .venv/ready
	.venv/bin/pip install --quiet --disable-pip-version-check -c constraints/newest.txt -e ".[studio,test-studio]"
	touch $@

.venv/ready: constraints/newest.txt
.venv/ready: EXTRAS = test,docs
.venv-floor/ready: constraints/floor.txt
.venv-floor/ready: EXTRAS = test
.venv/ready .venv-floor/ready: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check -c $(filter constraints/%,$^) -e ".[$(EXTRAS)]"
	touch $@

.venv-build/ready: constraints/newest.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check -c constraints/newest.txt build hatchling twine
	touch $@

.venv-wheel/ready: constraints/newest.txt pyproject.toml
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check -c constraints/newest.txt .
	touch $@

clean:
	rm -rf .venv .venv-floor .venv-build .venv-wheel dist out site
