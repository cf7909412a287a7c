# make docs: the site in _site/ (needs pip install -e '.[docs]'); make serve: look at it; make test-docs: check it
# make linkcheck: ask the network whether the links that leave the site are alive
# make rerun: run every chapter afresh and say which outputs differ from the stored ones (slow; NB='nbs/04_attention.ipynb' for one,
# NB='--jobs 2 --most 120' for two at a time and a fault where one takes over two minutes)
PYTHON ?= python

.PHONY: docs serve test-docs linkcheck clean-docs rerun
docs:
	$(PYTHON) docs/build.py _site

serve: docs
	$(PYTHON) -m http.server --directory _site --bind 127.0.0.1 8000

test-docs:
	$(PYTHON) -m pytest tests/test_site.py -q

linkcheck: docs
	$(PYTHON) -m sphinx -b linkcheck -q docs/_build/src docs/_build/linkcheck

clean-docs:
	rm -rf _site docs/_build

rerun:
	HF_HUB_OFFLINE=1 MPLBACKEND=Agg $(PYTHON) nbs/_refresh.py --check $(NB)
