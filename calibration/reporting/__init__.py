"""`vzip report`: one HTML page about a bundle."""

from __future__ import annotations

from typing import Final

MOST_IMAGES: Final = 12
"""Images that a report shows at most: each is a picture per precision in the page."""
