"""What the command line says of the engine's and the store's settings; those of the server say it themselves."""

from collections.abc import Mapping

HELP: Mapping[str, str] = {
    "max_running": "Answers that share forward passes; the others wait.",
    "max_step_tokens": "Tokens of one forward pass; by default measured on this machine.",
    "max_waiting": "Requests that may wait; more get 429.",
    "cache_bytes": "Bytes for keys, values and states.",
    "block_tokens": "Tokens whose keys and values are kept and evicted together.",
    "prefix_cache": "Keep keys and values for later requests that begin alike.",
    "fair_tokens": "Tokens by which one choice of adapters may get ahead of another that waits.",
    "draft": "Run a mixture's scaling pass ahead, for the token that it expects next.",
    "batch_invariant": "An answer's bits don't depend on how many tokens share its passes.",
    "auto_floor": "The least score, -1 to 1, with which auto chooses an adapter, not the base.",
    "cuda_graphs": "On a GPU, record the steps of decoding and replay them.",
    "max_length": "Tokens of prompt and answer together; by default what the model was made for.",
    "max_images": "Images of one request.",
    "max_image_pixels": "Pixels of a request's images together.",
    "on_fault": "After an error inside: restart the engine, or exit.",
    "max_restarts": "Restarts in --restart-window-s seconds; with one fault more it stops for good.",
    "restart_window_s": "Seconds in which --max-restarts are counted.",
    "num_slots": "Adapters that one forward pass can use.",
    "slot_bytes": "Bytes of adapters on the device; by default no limit.",
    "host_bytes": "Bytes of adapters in host memory; by default no limit.",
    "loading_threads": "Adapters that are read at once.",
}
