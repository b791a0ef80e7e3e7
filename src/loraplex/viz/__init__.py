"""Pictures and pages: captured attention, residuals, scalings."""

from loraplex.extras import require_extra

require_extra("plots", "drawing a picture")
