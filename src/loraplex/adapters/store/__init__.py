"""Where adapters are kept: slots on the device, host memory, disk."""
