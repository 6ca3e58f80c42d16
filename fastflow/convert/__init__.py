"""Makes models of other libraries fast: their layers keep all that they have, but for the class.

In the package, the function stands before the folder: `fastflow.convert(model)` is a call; all else
is imported, `from fastflow.convert import Report`.
"""

from fastflow.convert.layer import Unsupported
from fastflow.convert.walk import Report, Row, convert, revert

__all__ = ["Report", "Row", "Unsupported", "convert", "revert"]
