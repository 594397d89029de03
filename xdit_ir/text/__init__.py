"""Programs as complete text, and back: `parse(write(p).text, write(p).attachments)` is equal to `p`."""

from xdit_ir.text.compare import difference, equal
from xdit_ir.text.files import load, save
from xdit_ir.text.parse import parse
from xdit_ir.text.write import Document, write

__all__ = ["Document", "difference", "equal", "load", "parse", "save", "write"]
