"""Command line of the report: see hpo/results/report.py."""

import sys

from hpo.results.report import main

sys.exit(main(sys.argv[1:]))
