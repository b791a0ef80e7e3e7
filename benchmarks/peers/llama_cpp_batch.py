"""llama.cpp's side of cpu_peers.py: sequences that decode in one batch, in the environment of make_environments.sh.

All sequences of a context go through the same adapters, so the first one of a job stands for all.
"""

import ctypes
import os
import sys
from importlib.metadata import version
from typing import Any

import llama_cpp
import numpy as np
from worker import Job, Run, serve

ERROR = 4  # GGML_LOG_LEVEL_ERROR


class Model:
    """A model, its adapters, and the context of the last job that needed a new one."""

    def __init__(self, workload: dict[str, Any], extra_buffers: bool) -> None:
        params = llama_cpp.llama_model_default_params()
        params.use_extra_bufts = extra_buffers
        self._model = llama_cpp.llama_model_load_from_file(workload["model_file"].encode(), params)
        assert self._model, f"llama.cpp can't load {workload['model_file']}"
        self._adapters = {
            name: llama_cpp.llama_adapter_lora_init(self._model, file.encode())
            for name, file in workload["adapters"].items()
        }
        assert all(self._adapters.values()), f"llama.cpp can't load one of {workload['adapters']}"
        self._num_values = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._threads = workload["threads"]
        self._context: Any = None
        self._shape = (0, 0)  # sequences, tokens of each

    def generate(self, job: Job) -> list[list[int]]:
        """The most likely tokens after each prompt."""
        prompts = job["prompts"]
        self._prepare(len(prompts), len(prompts[0]) + job["new_tokens"], job["adapters"][0])
        tokens = self._decode([(row, 0, prompt) for row, prompt in enumerate(prompts)])
        answers = [[token] for token in tokens]
        for position in range(len(prompts[0]), len(prompts[0]) + job["new_tokens"] - 1):
            tokens = self._decode([(row, position, [token]) for row, token in enumerate(tokens)])
            for answer, token in zip(answers, tokens, strict=True):
                answer.append(token)
        return answers

    def _prepare(self, rows: int, length: int, adapter: str | None) -> None:
        """An empty context for so many sequences, with the adapter."""
        if rows != self._shape[0] or length > self._shape[1]:
            if self._context:
                llama_cpp.llama_free(self._context)
            params = llama_cpp.llama_context_default_params()
            params.n_ctx, params.n_seq_max = rows * length, rows
            params.n_threads = params.n_threads_batch = self._threads
            self._context = llama_cpp.llama_init_from_model(self._model, params)
            assert self._context, f"llama.cpp makes no context of {rows} times {length} tokens"
            self._shape = (rows, length)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        used = [] if adapter is None else [self._adapters[adapter]]
        pointers = (llama_cpp.llama_adapter_lora_p_ctypes * len(used))(*used)
        scales = (ctypes.c_float * len(used))(*[1.0] * len(used))
        llama_cpp.llama_set_adapters_lora(self._context, pointers, len(used), scales)

    def _decode(self, rows: list[tuple[int, int, list[int]]]) -> list[int]:
        """The next token of each row, which is a sequence, its first new position and its new tokens."""
        entries = [
            (token, first + i, row, i == len(tokens) - 1)
            for row, first, tokens in rows
            for i, token in enumerate(tokens)
        ]
        chosen = {}
        size = llama_cpp.llama_n_batch(self._context)
        for start in range(0, len(entries), size):
            part = entries[start : start + size]
            batch = llama_cpp.llama_batch_init(len(part), 0, 1)
            batch.n_tokens = len(part)
            for i, (token, position, row, is_last) in enumerate(part):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, position, 1, row
                batch.logits[i] = is_last
            status = llama_cpp.llama_decode(self._context, batch)
            assert status == 0, f"llama_decode returned {status}"
            for i, (_, _, row, is_last) in enumerate(part):
                if is_last:
                    logits = llama_cpp.llama_get_logits_ith(self._context, i)
                    chosen[row] = int(np.ctypeslib.as_array(logits, (self._num_values,)).argmax())
            llama_cpp.llama_batch_free(batch)
        return [chosen[row] for row, _, _ in rows]


@llama_cpp.llama_log_callback
def tell_errors(level: int, text: bytes, _: Any) -> None:
    if level >= ERROR:
        print(text.decode(errors="replace"), end="", file=sys.stderr)


def survives(workload: dict[str, Any], extra_buffers: bool) -> bool:
    """Whether a model runs, tried in a child process: weights repacked for AMX end the process on some machines."""
    child = os.fork()
    if child == 0:
        try:
            Model(workload, extra_buffers).generate({"prompts": [[1] * 8] * 8, "adapters": [None] * 8, "new_tokens": 2})
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    return not os.WIFSIGNALED(status)


def prepare(workload: dict[str, Any]) -> tuple[Run, str]:
    llama_cpp.llama_log_set(tell_errors, None)
    llama_cpp.llama_backend_init()
    extra_buffers = survives(workload, True)
    label = "" if extra_buffers else " with use_extra_bufts=False"
    return Model(workload, extra_buffers).generate, version("llama-cpp-python") + label


if __name__ == "__main__":
    serve(prepare)
