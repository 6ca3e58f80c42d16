"""`python -m fastflow`: what is installed, what is fast, what is missing and how to get it."""

import signal

from fastflow.diagnostics import report

if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # `head` may stop reading early: end without a traceback
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    print(report())
