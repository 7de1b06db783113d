#!/usr/bin/env python3
"""Times kernels of other projects on the shapes of one SpinKV decode step, beside the card's ceilings.

    ceilings   copy engine host -> device, device -> device copy, a read-only reduction
    topk       FlashInfer top_k beside torch.topk
    hisparse   the swap-in kernel of SGLang's HiSparse: look up a row's selected items in its hot buffer, choose victims by
               least recent use, copy the missing items from pinned host memory
    decode     FlashInfer's paged decode attention, every KV head with a page list of its own
    prefill    torch's causal attention (cuDNN's and FlashAttention's) of one long prompt

Method. N launches, each on its own input set, are captured into one CUDA graph; a replay between two CUDA events,
divided by N, is one sample, and a row is the median of 15. Before each replay, outside the interval, 512 MiB are read so that
nothing of the inputs is in L2, and the device is kept busy while the host enqueues the replay, so that the interval holds
no host time. Copies by the driver are too long for that to matter and are enqueued one by one instead; captured, a copy
within the device is another, slower one, which has its own row.

Each peer's output is checked once per shape before it is timed; a wrong answer is a failure, not a row.
A missing package skips its section. A configuration that fails is named and the next one runs, unless the failure took the
CUDA context with it: then the run ends. README.md says how to get the packages.
"""

import argparse
import dataclasses
import datetime
import importlib.util
import json
import math
import os
import statistics
import sys
import time
import traceback
from pathlib import Path

ROUNDS = 15
WARM_UP = 3
MIB = 1 << 20


class Skip(Exception):
    """A section cannot run here; the message says what is missing."""


class ContextLost(Exception):
    """A launch failed in a way that leaves this process no usable device; the message says which."""


@dataclasses.dataclass
class Row:
    section: str
    what: str
    shape: str
    us: float  # median of ROUNDS, one launch
    low: float
    high: float
    bytes: int = 0  # what a launch moves or reads; 0 where a rate says nothing
    ceiling: str = ""  # `what` of the row that bounds this one
    note: str = ""

    def rate(self):
        """GB/s, or None."""
        return self.bytes / self.us * 1e-3 if self.bytes else None


class Report:
    """The rows of a run: printed as they come, written as JSON after each section."""

    def __init__(self, path, meta):
        self.path = path
        self.meta = meta
        self.rows = []
        self.skipped = {}
        self.failed = {}

    def start(self, section, text):
        print(f"\n{section}: {text}")
        print(f"{'':24}{'':38}{'us':>10}{'range':>20}{'GB/s':>10}{'ceiling':>9}")

    def add(self, row):
        self.rows.append(row)
        rate = row.rate()
        share = self.share(row)
        print(
            f"{row.what:<24}{row.shape:<38}{row.us:>10.1f}{f'{row.low:.1f} - {row.high:.1f}':>20}"
            f"{'' if rate is None else f'{rate:.1f}':>10}{'' if share is None else f'{share:.3f}':>9}"
            f"{'  ' + row.note if row.note else ''}",
            flush=True,
        )

    def share(self, row):
        """The row's rate over its ceiling's, where this run measured the ceiling."""
        bound = next((r for r in self.rows if row.ceiling and r.what == row.ceiling), None)
        return row.rate() / bound.rate() if bound and row.bytes else None

    def fail(self, what, error):
        """A configuration or a section that failed: printed, kept for the JSON, and the run's exit status is 1."""
        reason = (str(error).splitlines() or [""])[0]
        self.failed[what] = f"{type(error).__name__}: {reason}"
        print(f"{what}: failed, {self.failed[what]}", flush=True)

    def save(self):
        if self.path is None:
            return
        rows = [dict(dataclasses.asdict(r), gb_per_s=r.rate(), of_ceiling=self.share(r)) for r in self.rows]
        text = json.dumps({"meta": self.meta, "rows": rows, "skipped": self.skipped, "failed": self.failed}, indent=1)
        Path(self.path).write_text(text + "\n")


def context_survives(torch):
    """After a failure: whether the device still does work. A fault of a kernel is for good in the process that met it."""
    try:
        torch.cuda.synchronize()
        return torch.ones(32, device="cuda").sum().item() == 32
    except Exception:
        return False


class Bench:
    """The timer: one device, its L2 flush and its events."""

    def __init__(self, torch):
        self.torch = torch
        self.device = torch.device("cuda")
        self.flush = torch.zeros(512 * MIB // 4, device=self.device)
        self.start = torch.cuda.Event(enable_timing=True)
        self.end = torch.cuda.Event(enable_timing=True)

    def graph(self, launches, reset=None):
        """us of one launch: (median, low, high). `reset` puts the inputs back before each replay, outside the interval."""
        graph = self.torch.cuda.CUDAGraph()
        # The first launches compile, load and allocate; a capture must not.
        if reset:
            reset()
        launches[0]()
        self.torch.cuda.synchronize()
        with self.torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for launch in launches:
                launch()
        return self.sample(graph.replay, len(launches), reset)

    def stream(self, launches):
        """The same without a graph, for launches of milliseconds."""

        def run():
            for launch in launches:
                launch()

        return self.sample(run, len(launches), None)

    def sample(self, run, launches, reset):
        samples = []
        for round_ in range(WARM_UP + ROUNDS):
            if reset:
                reset()
            self.flush.sum()  # reads: leaves no dirty lines to be written back inside the interval
            self.torch.cuda._sleep(2_000_000)  # about 1 ms: the replay is enqueued before it may start
            self.start.record()
            run()
            self.end.record()
            self.end.synchronize()
            if round_ >= WARM_UP:
                samples.append(self.start.elapsed_time(self.end) * 1e3 / launches)
        return statistics.median(samples), min(samples), max(samples)


def measure_ceilings(torch, bench, report, args):
    report.start("ceilings", "what the card itself does; a device -> device copy counts bytes read and written")
    size = 256 * MIB
    host = torch.zeros(2 * size, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(size, dtype=torch.uint8, device=bench.device)
    halves = [host[:size], host[size:]]
    launches = [lambda half=halves[i % 2]: target.copy_(half, non_blocking=True) for i in range(4)]
    report.add(Row("ceilings", "copy engine", "256 MiB, pinned host -> device", *bench.stream(launches), bytes=size))
    del host, halves, target, launches

    size = 512 * MIB
    source = torch.zeros(size, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    copies = [lambda: target.copy_(source)] * 4
    report.add(Row("ceilings", "device copy", "512 MiB, cudaMemcpyAsync", *bench.stream(copies), bytes=2 * size))
    report.add(Row("ceilings", "device copy", "512 MiB, the same in a graph", *bench.graph(copies), bytes=2 * size))
    words = [half.view(torch.int32) for half in (source, target)]
    kernels = [lambda: torch.bitwise_not(words[0], out=words[1])] * 4
    report.add(Row("ceilings", "read + write, kernel", "512 MiB, torch.bitwise_not", *bench.graph(kernels), bytes=2 * size))
    del source, target, words, copies, kernels

    size = 1024 * MIB
    values = torch.ones(size // 4, device=bench.device)
    for name, reduce in (("read, torch.sum", torch.sum), ("read, torch.amax", torch.amax)):
        if reduce(values).item() != (size // 4 if reduce is torch.sum else 1):
            raise AssertionError(f"{name} of ones is wrong")
        report.add(Row("ceilings", name, "1 GiB of f32", *bench.graph([lambda: reduce(values)] * 4), bytes=size))


def measure_topk(torch, bench, report, args):
    if importlib.util.find_spec("flashinfer") is None:
        raise Skip("flashinfer is not installed")
    if importlib.util.find_spec("tvm_ffi") is None:
        raise Skip("apache-tvm-ffi is not installed")
    import flashinfer

    report.meta["flashinfer"] = flashinfer.__version__
    report.start("topk", f"FlashInfer {flashinfer.__version__}, f32 normal scores, unsorted output; GB/s of scores read")
    for rows, width, k in ((128, 16384, 256), (128, 2048, 32), (8, 16384, 256)):
        size = rows * width * 4
        sets = min(512, max(16, math.ceil(192 * MIB / size)))
        generator = torch.Generator(bench.device).manual_seed(rows * width + k)
        scores = torch.randn(sets, rows, width, device=bench.device, generator=generator)
        shape = f"{rows} x {width}, k {k}"

        began = time.monotonic()
        values, indices = flashinfer.top_k(scores[0], k)
        torch.cuda.synchronize()
        if (built := time.monotonic() - began) > 5:
            print(f"(first call, compilation included: {built:.0f} s)")
        check_topk(torch, scores[0], k, values, indices, shape)

        peers = (
            ("flashinfer.top_k", lambda s: flashinfer.top_k(s, k)),
            ("torch.topk", lambda s: torch.topk(s, k, dim=1, sorted=False)),
        )
        for name, call in peers:
            times = bench.graph([lambda s=scores[i]: call(s) for i in range(sets)])
            report.add(Row("topk", name, shape, *times, bytes=size, note=f"{sets} sets"))


def check_topk(torch, scores, k, values, indices, shape):
    """The same multiset of values as torch.topk, at distinct places that hold them."""
    expected = torch.topk(scores, k, dim=1).values
    if not torch.equal(values.sort(dim=1, descending=True).values, expected):
        raise AssertionError(f"top_k {shape}: other values than torch.topk")
    if not torch.equal(scores.gather(1, indices.long()), values):
        raise AssertionError(f"top_k {shape}: an index does not hold its value")
    places = indices.long().sort(dim=1).values
    if (places[:, 1:] == places[:, :-1]).any():
        raise AssertionError(f"top_k {shape}: an index comes twice")


SWAP_ROWS = 128  # (request, KV head) pairs of a step
SWAP_SELECTED = 256  # selected items a row
SWAP_HOT = 1536  # slots of a row's hot buffer
SWAP_ITEMS = 8192  # items a row has on the host; 4 GiB of 4 KiB items in all
SWAP_SETS = 32  # states, each used once a replay
SWAP_POOLS = 4  # hot buffers; set i uses pool i % SWAP_POOLS
# Threads a row: the fewest that the kernel takes with this hot buffer (`scans_right`; the wrapper's default of 256 is below),
# and what the serving engine passes.
SWAP_BLOCKS = (512, 960)


def scans_right(threads, items):
    """Whether the kernel's scan over `items`, 32 a chunk, is right with so many threads.

    It takes as many chunks a step as the block has warps, but always scans 32 and leaves stale sums in those past its own. The
    next step replaces as many as there are warps; with fewer than 16 it adds up what is left, and from the third step on offsets
    are wrong and soon outside the kernel's shared memory: a fault (sgl-project/sglang#38243).
    """
    warps, chunks = threads // 32, -(-items // 32)
    return threads % 32 == 0 and (warps >= 16 or chunks <= 2 * warps)


def swap_source(header):
    """One translation unit that exports the kernel for each block size, with and without the copies.

    The parameters of `load_cache_to_device_buffer` are: threads, selected ids, hot slots, one tensor instead of K and V,
    the DeepSeek-V4 layout, tokens a selected block, ids are blocks, record the misses, skip the copies.
    """
    lines = [f'#include "{header}"', "#include <tvm/ffi/function.h>", "namespace sglang {"]
    for threads in SWAP_BLOCKS:
        if not scans_right(threads, SWAP_HOT) or not scans_right(threads, SWAP_SELECTED):
            raise AssertionError(f"the swap-in kernel is wrong with {threads} threads and {SWAP_HOT} slots; see SWAP_BLOCKS")
        for name, skip in (("swap_in", "false"), ("look_up", "true")):
            parameters = f"{threads}, {SWAP_SELECTED}, {SWAP_HOT}, true, false, 1, false, false, {skip}"
            entry = f"load_cache_to_device_buffer<{parameters}>"
            lines.append(f"TVM_FFI_DLL_EXPORT_TYPED_FUNC({name}_{threads}, ({entry}));")
    return "\n".join(lines + ["}"]) + "\n"


def find_sglang(folder):
    """The folder with `csrc/` and `include/`: as named, or of the installed package. SGLang itself is never imported."""
    if folder is None:
        spec = importlib.util.find_spec("sglang")
        if spec is None or not spec.submodule_search_locations:
            raise Skip("sglang is not installed; name its kernels/jit folder with --sglang")
        folder = Path(spec.submodule_search_locations[0]) / "kernels" / "jit"
    root = Path(folder).resolve()
    for part in ("csrc/kvcacheio/hisparse.cuh", "include/sgl_kernel/runtime.cuh"):
        if not (root / part).is_file():
            raise Skip(f"{root} has no {part}")
    return root


def build_swap(root, capability):
    """Compiles SGLang's kernel with its own flags, for a card of this compute capability."""
    import tvm_ffi.cpp

    major, minor = capability
    return tvm_ffi.cpp.load_inline(
        "peer_hisparse",
        cuda_sources=swap_source(root / "csrc" / "kvcacheio" / "hisparse.cuh"),
        extra_include_paths=[str(root / "include")],
        extra_cflags=["-std=c++20", "-O3"],
        extra_cuda_cflags=[f"-DSGL_CUDA_ARCH={major}{minor}0", "-std=c++20", "-O3", "--expt-relaxed-constexpr"],
    )


class SwapSets:
    """Inputs of the swap-in kernel: SWAP_SETS states over SWAP_POOLS hot buffers and one pinned host arena.

    Item t of row r is item r * SWAP_ITEMS + t of the arena, and slot s of row r is slot r * (SWAP_HOT + 1) + s of a pool; the
    last slot is the one that the kernel keeps for the newest item, which is never selected here. Every 32-bit word of the
    arena holds its own index, so that no two items have a byte pattern in common.
    """

    def __init__(self, torch, device, item_bytes):
        self.torch = torch
        self.device = device
        words = max(item_bytes) // 4
        self.arena = torch.empty(SWAP_ROWS * SWAP_ITEMS * words, dtype=torch.int32, pin_memory=True)
        torch.arange(self.arena.numel(), dtype=torch.int32, out=self.arena)
        self.mirror = self.arena.to(device)
        slots = SWAP_ROWS * (SWAP_HOT + 1)
        self.pools = torch.empty(SWAP_POOLS, slots * words, dtype=torch.int32, device=device)

        def ints(*shape, dtype):
            return torch.arange(math.prod(shape), dtype=dtype, device=device).view(*shape)

        self.arena_items = ints(SWAP_ROWS, SWAP_ITEMS, dtype=torch.int64)
        self.pool_slots = ints(SWAP_ROWS, SWAP_HOT + 1, dtype=torch.int32)
        self.requests = ints(SWAP_ROWS, dtype=torch.int64)
        self.lengths = torch.full((SWAP_ROWS,), SWAP_ITEMS, dtype=torch.int64, device=device)
        self.live = torch.tensor([SWAP_ROWS], dtype=torch.int32, device=device)
        self.none = torch.empty(0, device=device)

        def empty(width, dtype):
            return torch.empty(SWAP_SETS, SWAP_ROWS, width, dtype=dtype, device=device)

        # What the kernel changes, and what it is put back to.
        self.held, self.held_before = empty(SWAP_HOT + 1, torch.int32), empty(SWAP_HOT + 1, torch.int32)
        self.by_age, self.by_age_before = empty(SWAP_HOT, torch.int16), empty(SWAP_HOT, torch.int16)
        self.selected = empty(SWAP_SELECTED, torch.int32)
        self.found = empty(SWAP_SELECTED, torch.int32)

    def fill(self, misses):
        """New states: each row selects `misses` items that it does not hold, the rest from those that it holds, shuffled."""
        torch = self.torch
        generator = torch.Generator(self.device).manual_seed(misses)

        def shuffled(width):
            return torch.rand(SWAP_ROWS, width, device=self.device, generator=generator).argsort(dim=1)

        for i in range(SWAP_SETS):
            items = shuffled(SWAP_ITEMS - 1)
            held, absent = items[:, :SWAP_HOT], items[:, SWAP_HOT:]
            hits = held.gather(1, shuffled(SWAP_HOT)[:, : SWAP_SELECTED - misses])
            chosen = torch.cat((hits, absent[:, :misses]), dim=1)
            self.selected[i] = chosen.gather(1, shuffled(SWAP_SELECTED)).int()
            self.held_before[i, :, :SWAP_HOT] = held.int()
            self.held_before[i, :, SWAP_HOT] = SWAP_ITEMS - 1
            self.by_age_before[i] = shuffled(SWAP_HOT).short()
        self.reset()

    def reset(self):
        self.held.copy_(self.held_before)
        self.by_age.copy_(self.by_age_before)

    def arena_of(self, item_bytes, arena):
        words = item_bytes // 4
        return arena[: SWAP_ROWS * SWAP_ITEMS * words].view(-1, words)

    def pool_of(self, item_bytes, i):
        words = item_bytes // 4
        return self.pools[i % SWAP_POOLS, : SWAP_ROWS * (SWAP_HOT + 1) * words].view(-1, words)

    def launch(self, entry, item_bytes, i):
        entry(
            self.selected[i],  # top_k
            self.held[i],  # device_buffer_tokens
            self.arena_items,  # host_cache_locs
            self.pool_slots,  # device_buffer_locs
            self.arena_of(item_bytes, self.arena),  # host_cache_k
            self.none,  # host_cache_v
            self.pool_of(item_bytes, i),  # device_buffer_k
            self.none,  # device_buffer_v
            self.found[i],  # top_k_device_locs
            self.requests,  # req_pool_indices
            self.lengths,  # seq_lens
            self.by_age[i],  # lru_slots
            self.live,  # num_real_reqs
            1,  # page_size
            item_bytes,  # item_size_bytes
            self.none,  # miss_src_out
            self.none,  # miss_dst_out
            self.none,  # miss_count_out
        )

    def check(self, entry, item_bytes, misses, shape):
        """One launch on set 0: bytes, places and the number of slots that changed hands; a second one must find all."""
        torch = self.torch
        mirror, pool = self.arena_of(item_bytes, self.mirror), self.pool_of(item_bytes, 0)
        first = self.requests[:, None] * SWAP_ITEMS  # of each row, in the arena
        self.reset()
        pool.fill_(-1)
        slots = pool.view(SWAP_ROWS, SWAP_HOT + 1, -1)
        for row in range(SWAP_ROWS):
            slots[row, :SWAP_HOT] = mirror[first[row] + self.held[0, row, :SWAP_HOT].long()]
        self.found[0].fill_(-1)
        torch.cuda.synchronize()  # so that a fault below is the kernel's
        self.launch(entry, item_bytes, 0)
        torch.cuda.synchronize()
        places = self.found[0].long()
        expected = mirror[(first + self.selected[0].long()).flatten()]
        if (places < 0).any() or (places >= pool.shape[0]).any():
            raise AssertionError(f"swap_in {shape}: a place outside the hot buffers")
        if not torch.equal(pool[places.flatten()], expected):
            raise AssertionError(f"swap_in {shape}: an item's bytes are not the host's")
        in_order = places.sort(dim=1).values
        if (in_order[:, 1:] == in_order[:, :-1]).any():
            raise AssertionError(f"swap_in {shape}: two items in one slot")
        if not ((self.held[0] != self.held_before[0]).sum(dim=1) == misses).all():
            raise AssertionError(f"swap_in {shape}: another number of slots changed than there were misses")
        held = self.held[0].clone()
        self.launch(entry, item_bytes, 0)
        if not torch.equal(self.held[0], held) or not torch.equal(self.found[0].long(), places):
            raise AssertionError(f"swap_in {shape}: a second launch did not find what the first had brought")


def measure_hisparse(torch, bench, report, args):
    if importlib.util.find_spec("tvm_ffi") is None:
        raise Skip("apache-tvm-ffi is not installed")
    root = find_sglang(args.sglang)
    began = time.monotonic()
    module = build_swap(root, torch.cuda.get_device_capability())
    report.start(
        "hisparse",
        f"SGLang's swap-in kernel (compiled in {time.monotonic() - began:.0f} s), {SWAP_ROWS} rows, {SWAP_SELECTED} selected of "
        f"{SWAP_ITEMS}, hot buffer {SWAP_HOT}; GB/s of missing items' bytes; look_up: no bytes moved",
    )
    item_bytes = (4096, 1152)
    sets = SwapSets(torch, bench.device, item_bytes)
    for size in item_bytes:
        for misses in (0, round(0.1 * SWAP_SELECTED), SWAP_SELECTED):
            sets.fill(misses)
            for threads in SWAP_BLOCKS:
                for name in ("swap_in", "look_up"):
                    if name == "look_up" and size != item_bytes[0]:
                        continue  # nothing in it depends on the item's size
                    shape = f"{size} B, {100 * misses / SWAP_SELECTED:.0f} % missing, {threads} threads"
                    try:
                        measure_swap(torch, bench, report, sets, getattr(module, f"{name}_{threads}"), name, size, misses, shape)
                    except Exception as error:
                        report.fail(f"{name} {shape}", error)
                        if not context_survives(torch):
                            raise ContextLost(f"{name} {shape}") from error


def measure_swap(torch, bench, report, sets, entry, name, size, misses, shape):
    if name == "swap_in":
        sets.check(entry, size, misses, shape)
    launches = [lambda i=i: sets.launch(entry, size, i) for i in range(SWAP_SETS)]
    times = bench.graph(launches, sets.reset)
    note = f"{times[0] * 1e3 / (SWAP_ROWS * SWAP_SELECTED):.2f} ns a selected item"
    if misses:
        note += f", {times[0] * 1e3 / (SWAP_ROWS * misses):.2f} ns a missing one"
    moved = SWAP_ROWS * misses * size if name == "swap_in" else 0
    report.add(Row("hisparse", name, shape, *times, bytes=moved, ceiling="copy engine", note=note))


KV_HEADS, GROUP, HEAD = 8, 5, 128  # Qwen3-14B
DECODE_POOL = 2048 * MIB  # pages lie anywhere in it
DECODE_APART = 512 * MIB  # the sets of a replay read at least so much, each page once


def measure_decode(torch, bench, report, args):
    if importlib.util.find_spec("flashinfer") is None:
        raise Skip("flashinfer is not installed")
    if importlib.util.find_spec("tvm_ffi") is None:
        raise Skip("apache-tvm-ffi is not installed")
    import flashinfer

    report.meta["flashinfer"] = flashinfer.__version__
    report.start(
        "decode",
        f"FlashInfer {flashinfer.__version__}, {KV_HEADS} KV heads of {HEAD} in groups of {GROUP}, bf16; GB/s of K and V read",
    )
    generator = torch.Generator(bench.device).manual_seed(3)
    pool = torch.empty(DECODE_POOL // 2, dtype=torch.bfloat16, device=bench.device)
    for part in pool.chunk(16):
        part.copy_(torch.rand(part.shape, device=bench.device, generator=generator) * 3.4 - 1.7)
    for batch, tokens, page in (
        (1, 2048, 8),
        (16, 2048, 8),
        (16, 2048, 16),
        (16, 2048, 64),
        (64, 2048, 8),
        (64, 2048, 16),
        (64, 2048, 64),
        (16, 32768, 16),
        (16, 32768, 64),
    ):
        # A row is a KV head of a request, and a request to FlashInfer: so each has its own list.
        rows, pages = batch * KV_HEADS, tokens // page
        cache = pool.view(-1, 2, page, 1, HEAD)
        size = rows * tokens * 2 * HEAD * 2
        sets = min(math.ceil(DECODE_APART / size), cache.shape[0] // (rows * pages))
        order = torch.randperm(cache.shape[0], device=bench.device, generator=generator).int()
        queries = (torch.rand(rows, GROUP, HEAD, device=bench.device, generator=generator) * 3.4 - 1.7).bfloat16()
        starts = torch.arange(rows + 1, dtype=torch.int32, device=bench.device) * pages
        last = torch.full((rows,), page, dtype=torch.int32, device=bench.device)
        launches = []
        for i in range(sets):
            scratch = torch.empty(128 * MIB, dtype=torch.uint8, device=bench.device)
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(scratch, "NHD", use_tensor_cores=True)
            ids = order[i * rows * pages : (i + 1) * rows * pages].contiguous()
            types = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
            wrapper.plan(starts, ids, last, GROUP, 1, HEAD, page, **types)
            output = torch.empty_like(queries)
            launches.append(lambda wrapper=wrapper, output=output: wrapper.run(queries, cache, out=output))
        shape = f"batch {batch}, {tokens} tokens, pages of {page}"
        check_decode(torch, launches[0](), queries, cache, order[:pages], shape)
        report.add(Row("decode", "flashinfer decode", shape, *bench.graph(launches), bytes=size, note=f"{sets} sets"))
        del launches


def check_decode(torch, found, queries, cache, ids, shape):
    """The first row against attention in f64."""
    keys, values = cache[ids.long()].double().transpose(0, 1).reshape(2, -1, HEAD)
    weights = torch.softmax(queries[0].double() @ keys.T / math.sqrt(HEAD), dim=1)
    expected = weights @ values
    off = ((found[0].double() - expected).norm() / expected.norm()).item()
    if not off <= 5e-3:
        raise AssertionError(f"decode {shape}: off by {off}")


def measure_prefill(torch, bench, report, args):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    report.start("prefill", f"torch SDPA, causal, bf16, {KV_HEADS * GROUP} query heads and {KV_HEADS} KV heads of {HEAD}")
    for tokens in (8192, 32768):
        flops = 4 * HEAD * KV_HEADS * GROUP * tokens * (tokens + 1) // 2
        shapes = [(1, heads, tokens, HEAD) for heads in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS)]
        inputs = [torch.randn(shape, dtype=torch.bfloat16, device=bench.device) for shape in shapes]
        for name, backend in (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):

            def launch(backend=backend):
                with sdpa_kernel(backend):
                    return torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)

            try:
                launch()
                times = bench.stream([launch] * 4)
            except RuntimeError as error:
                report.fail(f"prefill {name} {tokens}", error)
                continue
            note = f"{flops / times[0] * 1e-6:.0f} TFLOP/s"
            report.add(Row("prefill", f"SDPA, {name}", f"{tokens} tokens", *times, note=note))


SECTIONS = {
    "ceilings": measure_ceilings,
    "topk": measure_topk,
    "hisparse": measure_hisparse,
    "decode": measure_decode,
    "prefill": measure_prefill,
}


def sections_of(text):
    names = text.split(",")
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    return [name for name in SECTIONS if name in names]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=sections_of, default=list(SECTIONS), help="sections, with commas between them")
    parser.add_argument("--json", metavar="FILE", help="write the rows there too")
    parser.add_argument("--sglang", metavar="DIR", help="sglang/kernels/jit of the wheel (default: the installed package's)")
    args = parser.parse_args()

    try:
        import torch
    except ImportError:
        sys.exit("peers.py: torch is not installed")
    if not torch.cuda.is_available():
        sys.exit("peers.py: torch finds no CUDA device")

    major, minor = torch.cuda.get_device_capability()
    # Both compilers ask the environment; "a" for the instructions that only this architecture has.
    arch = f"{major}.{minor}{'a' if major >= 9 else ''}"
    os.environ.setdefault("FLASHINFER_CUDA_ARCH_LIST", arch)
    os.environ.setdefault("TVM_FFI_CUDA_ARCH_LIST", arch)

    meta = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "rounds": ROUNDS,
    }
    print(f"{meta['device']}, torch {meta['torch']}, CUDA {meta['cuda']}; medians of {ROUNDS} replays, us a launch")
    report = Report(args.json, meta)
    bench = Bench(torch)
    gone = None
    for name in args.only:
        try:
            SECTIONS[name](torch, bench, report, args)
        except Skip as reason:
            report.skipped[name] = str(reason)
            print(f"\n{name}: skipped, {reason}")
        except ContextLost as lost:
            gone = str(lost)
        except Exception as error:  # a peer's failure must not cost the other sections
            report.fail(name, error)
            traceback.print_exc()
            gone = None if context_survives(torch) else name
        sys.stdout.flush()
        report.save()
        if gone:
            print(f"\nthe CUDA context was lost in: {gone}; nothing after it was measured", flush=True)
            # Destructors of tensors and events would only repeat the error.
            sys.stderr.flush()
            os._exit(1)
    sys.exit(1 if report.failed else 0)


if __name__ == "__main__":
    main()
