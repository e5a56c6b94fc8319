"""sbattn x vineppo: nine rollouts from every step, over one cache of the trajectory they leave.

The states of a trajectory begin alike, and rollouts differ in their last tokens only; still, each
rollout gets a copy of the keys and values of its beginning. Queries that break sticks, nearest key
first, need none: a rollout keeps its own tokens, and what these leave of the stick goes to the
trajectory, which all rollouts read in one product. vineppo has no attention, sbattn no states.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from decapod.lm import Completion, Request, SamplingParams
from decapod.lm.engine import check_requests
from sbattn import LayerCache, merge_segments, stickbreaking_attention, stickbreaking_decode
from sbattn.integrations.transformers import convert
from vineppo import Episode, InvalidInputError, Rollout
from vineppo.backend import Usage
from vineppo.rollout import Call, TransformersBackend
from vineppo.values import MonteCarloValueEstimator
from vineppo.vines import VineValues

Trunk = dict[int, list[Tensor]]  # keys and values of a layer, [1 or states, heads, tokens, size]
VOCABULARY, LAYERS, HEADS, KEY_HEADS, SIZE = 256, 2, 4, 2, 64
K, STEP = 9, 8
SPENT = 2.0**-24  # of a stick: nothing, in float32; sbattn's own tolerance
SIGHT = {"far": (-1.0, -5.0), "near": (0.0, 0.0)}  # mean logit of the first head and of the last


class Vine:
    """The keys and values of a trajectory, its trunk, and the own ones of the rollouts from it.

    State s sees ``lengths[s]`` tokens of the trunk; a rollout's ``place`` is state * width + i.
    """

    def __init__(
        self, trunk: Trunk, lengths: list[int], width: int, place: list[int], room: int
    ) -> None:
        self.trunk, self.width = trunk, width
        self.lengths, self.place = torch.tensor(lengths), torch.tensor(place)
        self.caches = {layer: LayerCache(room) for layer in trunk}
        self.trunk_bytes = allocated(x for of in trunk.values() for x in of)
        self.own_bytes = self.asked = self.read = 0  # read: how often a state's trunk was

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """A new token of each rollout, [rollouts, heads, 1, size]: its own keys, then the trunk."""
        own = self.caches[layer].append(key, value)
        self.own_bytes += allocated(own) if own[0].shape[2] == 1 else 0
        near = stickbreaking_attention(
            query, *own, scale=scale, enable_gqa=True, skip_tol=0, return_log_remainder=True,
            backend="naive",
        )  # fmt: skip
        left, states = near[1].exp().amax((1, 2)), len(self.lengths)
        some = self.place // self.width
        wanted = torch.bincount(some[left > SPENT], minlength=states) > 0
        self.asked, self.read = self.asked + len(some.unique()), self.read + int(wanted.sum())
        if not wanted.any():
            return near[0]
        # Rollouts of a state see one trunk: to the operator they are more heads of a single query.
        keys, values = (x.expand(states, -1, -1, -1).transpose(1, 2) for x in self.trunk[layer])
        split = (key.shape[1], query.shape[1] // key.shape[1], query.shape[3])
        grid = query.new_zeros(states * self.width, *split)
        grid[self.place] = query.reshape(-1, *split)
        found = stickbreaking_decode(
            grid.unflatten(0, (states, -1)).transpose(1, 2).flatten(1, 3)[:, None], keys, values,
            cache_seqlens=self.lengths * wanted, scale=scale, attend_current=True,
            skip_tol=SPENT / float(left.max()),
        )  # fmt: skip
        far, rest = (
            x.view(states, split[0], self.width, split[1], -1).transpose(1, 2).flatten(0, 1)
            .flatten(1, 2)[self.place, :, None]
            for x in found
        )  # fmt: skip
        return merge_segments(near, (far, rest[..., 0]))[0]

    def keep(self, rollouts: list[int]) -> None:
        """Go on with these alone."""
        self.place = self.place[rollouts]
        for cache in self.caches.values():
            cache.reorder(torch.tensor(rollouts))


def allocated(tensors: Iterable[Tensor]) -> int:
    """Bytes behind tensors, however many views there are of them."""
    return sum({(s := x.untyped_storage()).data_ptr(): s.nbytes() for x in tensors}.values())


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: None, *, scaling: float,
    trunk: Trunk | None = None, vine: Vine | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """What layers of transformers call, while a trunk is read and while a vine grows from it."""
    if vine is not None:
        return vine.attend(module.layer_idx, query, key, value, scaling).transpose(1, 2), None
    if trunk is not None:
        trunk[module.layer_idx] = [key, value]
    out, _rest = stickbreaking_attention(query, key, value, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2), None


class SegmentsBackend:
    """Rollouts of a stick-breaking model of transformers over one trunk per trajectory.

    Unless ``shared``: then every rollout has a trunk of its own, computed for it again.
    """

    def __init__(self, model: Any, eos: Iterable[int] = (), *, shared: bool = True) -> None:
        AttentionInterface.register("vines", attention)
        model.set_attn_implementation("vines")
        self.model, self.eos, self.shared = model.eval(), frozenset(eos), shared
        self.usage = Usage()
        self.vines: list[Vine] = []  # of the last call

    def load_weights(self, model: Any) -> None:
        """Copy them; nothing that the old ones made is kept between calls."""
        if model is not self.model:
            self.model.load_state_dict(model.state_dict())

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def generate(
        self, prompts: Sequence[Sequence[int]], n: Any, params: Any, seeds: Sequence[int]
    ) -> list[list[Rollout]]:
        """The rollouts of one trajectory after those of another."""
        call, started = Call.of(prompts, n, params, seeds), time.perf_counter()
        call.needs_eos("eos", bool(self.eos))
        for p in (r.params for r in call.requests):
            sampler = p.logprobs_of == "sampler" and not p.draws_from_model
            if p.stop or p.top_k or p.top_p < 1 or sampler:
                raise InvalidInputError("params: expected a temperature and stop tokens alone")
        with call.told():
            check_requests(call.requests, vocab_size=self.model.config.vocab_size, max_length=None)
        together: list[list[Request]] = []
        for request in sorted(call.requests, key=lambda r: r.prompt, reverse=True):
            if together and together[-1][0].prompt[: len(request.prompt)] == request.prompt:
                together[-1].append(request)  # the first one's prompt goes on from this one's
            else:
                together.append([request])
        self.vines = []
        done = sorted((d for rs in together for d in self._grow(rs)), key=lambda d: int(d.id))
        reused = self.shared * sum(len(r.prompt) - 1 for rs in together for r in rs[1:])
        self.usage += call.usage(done, reused, time.perf_counter() - started)
        return call.rollouts(done)

    def _trunk(self, contexts: Sequence[tuple[int, ...]]) -> Trunk:
        parts: list[Trunk] = []
        for context, copies in Counter(contexts).items():
            parts.append({})
            ids = torch.tensor([context or (0,)]).expand(copies, -1)
            self.model(ids, use_cache=False, logits_to_keep=1, trunk=parts[-1])
        longest = max(1, *map(len, contexts))
        return {
            layer: [
                torch.cat([pad(part[layer][i], (0, 0, 0, longest - part[layer][i].shape[2]))
                           for part in parts])
                for i in (0, 1)
            ]
            for layer in parts[0]
        }  # fmt: skip

    def _grow(self, requests: list[Request]) -> list[Completion]:
        """Rollouts of one trajectory, longest prompt first."""
        contexts, params = [r.prompt[:-1] for r in requests], [r.params for r in requests]
        room, states = max(p.max_new_tokens for p in params), Counter(contexts)
        if self.shared:
            width, lengths, trunk = max(states.values()), map(len, states), contexts[:1]
            row = {state: i * width for i, state in enumerate(states)}
            place = [row[c] + i - contexts.index(c) for i, c in enumerate(contexts)]
        else:
            width, lengths, trunk = 1, map(len, contexts), contexts
            place = list(range(len(contexts)))
        vine = Vine(self._trunk(trunk), list(lengths), width, place, room)
        self.vines.append(vine)
        noise = torch.zeros(len(requests), room, self.model.config.vocab_size)
        for row_noise, r in zip(noise, requests, strict=True):
            if r.params.temperature:  # the argmax of log-probability plus Gumbel noise is a draw
                draws = torch.Generator().manual_seed(r.seed)
                drawn = row_noise[: r.params.max_new_tokens].exponential_(generator=draws)
                drawn.log_().mul_(-r.params.temperature)
        ends = [{*p.stop_token_ids, *(() if p.ignore_eos else self.eos)} for p in params]
        ids: list[list[int]] = [[] for _ in requests]
        logprobs: list[list[float]] = [[] for _ in requests]
        live, last = list(range(len(requests))), torch.tensor([r.prompt[-1] for r in requests])
        for step in range(room):
            logits = self.model(last[:, None], use_cache=False, vine=vine).logits[:, -1]
            scores = logits.log_softmax(-1)
            last = (scores + noise[live, step]).argmax(-1)
            chosen = scores.gather(-1, last[:, None])[:, 0].tolist()
            for i, token, logprob in zip(live, last.tolist(), chosen, strict=True):
                ids[i].append(token)
                logprobs[i].append(logprob)
            going = [
                at for at, i in enumerate(live)
                if ids[i][-1] not in ends[i] and len(ids[i]) < params[i].max_new_tokens
            ]  # fmt: skip
            if not going:
                break
            if len(going) < len(live):
                live, last = [live[at] for at in going], last[going]
                vine.keep(going)
        return [
            Completion(tuple(i), tuple(p), "stop" if i[-1] in end else "length", r.id)
            for i, p, end, r in zip(ids, logprobs, ends, requests, strict=True)
        ]


def build(sight: str, seed: int) -> Any:
    """A Llama of random weights that breaks sticks, with heads that look near or far.

    Logits are about normal around each head's mean, which its first feature carries.
    """
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HEADS * SIZE, intermediate_size=4 * HEADS * SIZE,
        num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS,
        attention_bias=True, initializer_range=1 / 16, max_position_embeddings=4096,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(config).eval()
        for layer in model.model.layers:
            q, k = layer.self_attn.q_proj, layer.self_attn.k_proj
            q.weight[::SIZE], k.weight[::SIZE], k.bias[::SIZE] = 0, 0, 1
            q.bias[::SIZE] = torch.linspace(*SIGHT[sight], HEADS) * SIZE**0.5
    return convert(model)


def odd(episodes: Sequence[Episode]) -> list[float]:
    """A reward that any token of an answer can turn."""
    return [float(sum(episode.response_ids) % 2) for episode in episodes]


def race(
    *, prompt: int, sight: str, steps: int, room: int, repeats: int, seed: int
) -> dict[str, Any]:
    """Values of an answer's steps by all arms in turn; before that, greedy rollouts, compared."""
    torch.set_num_threads(1)
    arms: dict[str, Any] = {
        "merged": SegmentsBackend(build(sight, seed)),
        "recomputed": SegmentsBackend(build(sight, seed), shared=False),
        "copied": TransformersBackend(build(sight, seed)),
    }
    question = np.random.default_rng(seed).integers(3, VOCABULARY, prompt).tolist()
    whole, drawn = (SamplingParams(length, ignore_eos=True) for length in (room, STEP * steps))
    answer = arms["copied"].generate([question], 1, drawn, [seed])[0][0].token_ids
    ends = range(0, STEP * steps, STEP)
    greedy = [SamplingParams(room - end, 0.0, ignore_eos=True) for end in ends]
    states = [[*question, *answer[:end]] for end in ends]
    rollouts = {name: arm.generate(states, 2, greedy, [0] * steps) for name, arm in arms.items()}
    # What the trunk is for: the same without it.
    blind = arms["merged"].generate([state[-1:] for state in states], 2, greedy, [0] * steps)
    ids, logprobs = (
        {name: np.concatenate([getattr(r, what) for of in found for r in of])
         for name, found in {**rollouts, "blind": blind}.items()}
        for what in ("token_ids", "logprobs")
    )  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    values: dict[str, list[list[float]]] = {name: [] for name in arms}
    for repeat in range(repeats):
        for name in np.roll(list(arms), repeat).tolist():
            estimator = MonteCarloValueEstimator(
                arms[name], odd, K, params=whole, max_response_tokens=room
            )
            vines = VineValues(estimator, odd, segmenter=f"fixed:{STEP}")
            started = time.process_time()
            credit = vines([question], [answer], [False], [0], seed=repeat)
            seconds[name].append(time.process_time() - started)
            values[name].append(credit.step_values[0].tolist())
    vine, alone = arms["merged"].vines[0], arms["recomputed"].vines[0]
    return {
        "tokens": K * sum(room - end for end in ends), "seconds": seconds, "values": values,
        "compared": len(ids["merged"]), "unread": 1 - vine.read / vine.asked,
        "differ": {name: int((of != ids["merged"]).sum()) for name, of in ids.items()},
        "apart": {n: float(np.abs(of - logprobs["merged"]).max()) for n, of in logprobs.items()},
        "bytes": {"trunk": vine.trunk_bytes, "own": vine.own_bytes, "trunks": alone.trunk_bytes},
    }  # fmt: skip
