"""The routes of vLLM's server that the engine uses, around a tiny transformers model.

It keeps vLLM's contract where that hurts: a failed update leaves weights that end the server when
it generates, the connection is closed after a failure, and labels of weights move only when told.
The tests of the client run against both.

Run by hand: ``python fake_vllm_server.py FOLDER [PORT]``.
"""

from __future__ import annotations

import copy
import json
import sys
import threading
import time
from base64 import b64decode
from contextlib import suppress
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import torch
from safetensors.torch import load, load_file
from transformers import LlamaForCausalLM

from decapod.lm import Request, RequestError, SamplingParams, TransformersEngine

LIMIT_S = 20.0


class FakeVLLMServer(ThreadingHTTPServer):
    """A server for one model.

    Attributes:
        calls: path and body, or query, of every call.
        faults: what to do with the next calls of a path instead of answering them: a status;
            ``"drop"`` the connection; ``"lost"``, do the work and drop the connection; a float, do
            the work and answer so many seconds later; a dict of fields to change in the answer.
        broken: weights are half loaded.
        dead: somebody generated with those.
    """

    daemon_threads = True

    def __init__(self, folder: Path, port: int = 0, name: str = "tiny") -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.folder, self.name = folder, name
        self.model = copy.deepcopy(model_in(folder))
        self.engine = TransformersEngine(self.model)
        self.label = "default"
        self.labelled = True
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.faults: dict[str, list[Any]] = {}
        self.broken = self.dead = self.updating = False
        self.running = threading.Event()
        self.running.set()
        self.computing = threading.Lock()
        self.swap_at: tuple[int, str] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def paths(self) -> list[str]:
        return [path for path, _ in self.calls]

    def load(self, weights: dict[str, torch.Tensor]) -> None:
        """In place, in order, up to the first that does not fit: as vLLM, not as one would like."""
        own = self.model.state_dict()
        self.broken = True
        for name, value in weights.items():
            if own[name].shape != value.shape:
                raise ValueError(f"{name}: {tuple(value.shape)} into {tuple(own[name].shape)}")
            own[name].copy_(value)
        self.broken = False


@lru_cache(maxsize=1)
def model_in(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


class RefusalError(Exception):
    """An answer with a status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeVLLMServer

    def log_message(self, *args: object) -> None:
        """Silence."""

    def do_GET(self) -> None:
        self.serve({})

    def do_POST(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        self.serve(json.loads(self.rfile.read(size)) if size else {})

    def serve(self, body: dict[str, Any]) -> None:
        address = urlsplit(self.path)
        path = address.path.strip("/")
        query = {name: values[-1] for name, values in parse_qs(address.query).items()}
        self.server.calls.append((path, body | query))
        waiting = self.server.faults.get(path, [])
        fault = waiting.pop(0) if waiting else None
        if fault == "drop":
            self.close_connection = True
            return
        try:
            if isinstance(fault, int):
                raise RefusalError(fault, "made to fail")
            content = self.answer(path, body, query)
            if isinstance(fault, dict):
                content["choices"][0].update(fault)
        except RefusalError as error:
            self.send(error.status, {"error": {"message": str(error)}})
            return
        except Exception as error:  # noqa: BLE001 - the client is told
            self.send(500, {"error": {"message": f"{type(error).__name__}: {error}"}})
            return
        if isinstance(fault, float):
            time.sleep(fault)
        if fault == "lost":
            self.close_connection = True
            return
        with suppress(BrokenPipeError, ConnectionResetError):
            self.send(200, content)

    def send(self, status: int, content: Any) -> None:
        data = b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status >= 500:
            self.close_connection = True
        self.end_headers()
        self.wfile.write(data)

    def answer(self, path: str, body: dict[str, Any], query: dict[str, str]) -> Any:
        server = self.server
        if server.dead:
            raise RefusalError(503 if path == "health" else 500, "EngineCore encountered an issue")
        match path:
            case "health":
                return None
            case "v1/models":
                return {"data": [{"id": server.name, "root": str(server.folder)}]}
            case "get_world_size":
                return {"world_size": 1}
            case "weight_info" | "update_weight_version" if not server.labelled:
                raise RefusalError(404, "Not Found")
            case "weight_info":
                return {"weight_version": server.label}
            case "update_weight_version":
                server.label = body["new_version"]
                return {"success": True}
            case "pause":
                if query.get("mode", "abort") not in ("wait", "keep", "abort"):
                    raise RefusalError(400, "Input should be 'abort', 'wait' or 'keep'")
                server.running.clear()
                with server.computing:  # what is being generated ends
                    return {"status": "paused"}
            case "resume":
                server.running.set()
                return {"status": "resumed"}
            case "is_paused":
                return {"is_paused": not server.running.is_set()}
            case "reset_prefix_cache":
                return {"success": True}
            case "collective_rpc":
                return {"results": [self.reload(**body["kwargs"])]}
            case "start_weight_update":
                if server.updating:
                    raise RuntimeError("start_weight_update called while one is already active")
                server.updating = server.broken = True
                return {"message": "Weight update started"}
            case "update_weights":
                self.update(body["update_info"])
                return {"message": "Weights updated"}
            case "finish_weight_update":
                if not server.updating:
                    raise RuntimeError("finish_weight_update called without a start")
                server.updating = server.broken = False
                server.label = body.get("weight_version") or server.label
                return {"message": "Weight update finished"}
            case "init_weight_transfer_engine":
                return {"message": "Weight transfer initialized"}
            case "v1/completions":
                return {"choices": [self.completion(body)]}
            case "inference/v1/generate":
                return {"choices": [self.tokens(body)]}
        raise RefusalError(404, "Not Found")

    def reload(self, weights_path: str) -> None:
        self.server.broken = True
        files = sorted(Path(weights_path).glob("*.safetensors"))
        if not files:
            raise ValueError(f"no model in {weights_path}")
        self.server.load({k: v for file in files for k, v in load_file(file).items()})

    def update(self, info: dict[str, Any]) -> None:
        if not self.server.updating:
            raise RuntimeError("start_weight_update must be called before update_weights")
        try:
            self.server.load(load(b64decode(info["safetensors"])))
        except Exception:
            self.server.updating = False
            raise
        finally:
            self.server.broken = True

    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        done = self.generated(
            body["prompt"],
            SamplingParams(
                body["max_tokens"],
                body["temperature"],
                body["top_p"],
                body.get("top_k", 0),
                tuple(body.get("stop_token_ids", ())),
                ignore_eos=body.get("ignore_eos", False),
                logprobs_of="sampler",
            ),
            body["seed"],
        )
        return {
            "index": 0,
            "finish_reason": done.finish_reason,
            "token_ids": done.token_ids,
            "logprobs": {"token_logprobs": done.logprobs},
        }

    def tokens(self, body: dict[str, Any]) -> dict[str, Any]:
        given = body["sampling_params"]
        params = SamplingParams(
            given["max_tokens"],
            given["temperature"],
            given["top_p"],
            given["top_k"],
            tuple(given["stop_token_ids"]),
            ignore_eos=given["ignore_eos"],
            logprobs_of="sampler",
        )
        done = self.generated(body["token_ids"], params, given["seed"])
        spans = [{"version": self.server.label, "start": 0, "end": len(done.token_ids)}]
        if self.server.swap_at is not None:
            at, before = self.server.swap_at
            spans = [
                {"version": before, "start": 0, "end": at},
                {"version": self.server.label, "start": at, "end": len(done.token_ids)},
            ]
        content = [
            {"token_id": token, "logprob": logprob, "rank": 1}
            for token, logprob in zip(done.token_ids, done.logprobs, strict=True)
        ]
        return {
            "index": 0,
            "finish_reason": done.finish_reason,
            "token_ids": done.token_ids,
            "logprobs": {"content": content},
            "weight_versions": spans,
        }

    def generated(self, prompt: list[int], params: SamplingParams, seed: int) -> Any:
        if not self.server.running.wait(LIMIT_S):
            raise RuntimeError("paused for too long")
        with self.server.computing:
            if self.server.broken:
                self.server.dead = True
                raise RuntimeError("EngineCore encountered an issue")
            try:
                return self.server.engine.generate([Request(tuple(prompt), params, seed)])[0]
            except RequestError as error:
                raise RefusalError(400, str(error)) from error


def main(folder: str, port: str = "0") -> None:
    server = FakeVLLMServer(Path(folder), int(port))
    print(server.url, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
