"""Pictures and pages: captured attention, residuals, scalings."""
