"""`python -m fastflow`: what is installed, what is fast, what is missing and how to get it."""

from fastflow.diagnostics import report

if __name__ == "__main__":
    print(report())
