"""How the paper is made of it: scales, tables, figures, notebooks."""

import sys

# An optional checker of internationalised addresses costs the import of nbformat 2 s, and nothing here needs it.
sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]
