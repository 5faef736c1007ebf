"""Speed of this package beside the other ways to run the same checkpoint, in one run on one machine.

    python benchmarks/speed.py            # everything, all rounds
    python benchmarks/speed.py --quick    # a few minutes, without the slowest peers and documents
    python benchmarks/speed.py --workloads query queries --add    # some workloads, added to the results there are
    python benchmarks/speed.py --device cuda --name speed-gpu    # on a GPU: more texts, documents as long as in mGTE's paper

Every measurement is a fresh process that loads, warms up and runs the workloads; the processes of one round follow each
other, and rounds repeat, so that a slow phase of the machine hits all alike. Medians over rounds are printed as a table and
written to ``benchmarks/results``. The checkpoint has the size of gte-multilingual-base and random weights.

Needs ``pip install sentence-transformers onnxruntime onnx onnxscript openvino matplotlib``; a missing package only leaves its
peers out.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "268435456",
}
PEERS = {
    # name: (needed packages, part of --quick, workloads or None for all)
    "gte-rag float32": ((), True, None),
    "gte-rag bf16": ((), True, None),
    "gte-rag int8": ((), True, None),
    "onnxruntime float32, one by one": (("onnxruntime", "onnx"), True, None),
    "onnxruntime int8, one by one": (("onnxruntime", "onnx"), True, None),
    "onnxruntime int8, batch 8 sorted": (("onnxruntime", "onnx"), False, ("queries", "passages")),
    "openvino bf16, one by one": (("openvino", "onnx"), False, None),
    "openvino float32, one by one": (("openvino", "onnx"), False, None),
    "transformers float32, batch 8 sorted": (("transformers",), True, None),
    "transformers bf16, batch 8 sorted": (("transformers",), False, None),
    "transformers eager float32": (("transformers",), False, ("document 2k", "document 8k")),
    "sentence-transformers bf16, batch 8": (("sentence_transformers",), True, None),
    "sentence-transformers float32": (("sentence_transformers",), False, ("query", "queries", "passages")),
    "sentence-transformers as it comes": (("sentence_transformers",), False, ("query", "passages")),
}
GPU_PEERS = {
    "gte-rag bf16": ((), True, None),
    "gte-rag float32": ((), True, ("query", "queries", "passages")),
    "transformers bf16, batch 32 sorted": (("transformers",), True, None),
    "sentence-transformers bf16": (("sentence_transformers",), True, None),
    "sentence-transformers as it comes": (("sentence_transformers",), True, None),
}
ONE_ROUND = ("sentence-transformers as it comes", "sentence-transformers float32", "transformers eager float32")
CALM = (
    0.25  # share of the processor's time that other processes may have taken for a measurement to count beside others
)
SHAPES = ((768, 2304), (768, 768), (768, 6144), (3072, 768))  # of the network's matrix products
Encode = Callable[[Sequence[str]], Any]


def peers(device: str) -> dict[str, tuple[tuple[str, ...], bool, tuple[str, ...] | None]]:
    """Return what is measured on a device."""
    return PEERS if device == "cpu" else GPU_PEERS


def is_slow(peer: str, device: str) -> bool:
    """Tell whether one round of a peer takes long enough."""
    return device == "cpu" and peer in ONE_ROUND


def workloads(tokenizer_file: Path, quick: bool, device: str = "cpu") -> dict[str, list[str]]:
    """Make the texts, the same for all: words drawn by a seeded generator from the tokenizer's pieces."""
    import numpy as np

    random = np.random.default_rng(0)
    pieces = json.loads(tokenizer_file.read_text(encoding="utf-8"))["model"]["vocab"][:20_000]
    words = [piece[1:] for piece, _ in pieces if piece.startswith("▁") and len(piece) > 2]

    def text(tokens: int) -> str:
        return " ".join(words[place] for place in random.integers(len(words), size=tokens - 2))

    if device != "cpu":
        return {
            "query": [text(int(length)) for length in random.integers(6, 14, size=20)],
            "queries": [text(int(length)) for length in random.integers(6, 20, size=4096)],
            "passages": [text(int(length)) for length in random.integers(20, 401, size=4096)],
            "documents 4.5k": [text(4456) for _ in range(128)],
        }
    made = {
        "query": [text(int(length)) for length in random.integers(6, 14, size=20)],
        "queries": [text(int(length)) for length in random.integers(6, 20, size=64)],
        "passages": [text(int(length)) for length in random.integers(20, 401, size=16 if quick else 32)],
        "document 2k": [text(2048)],
    }
    if not quick:
        made["document 8k"] = [text(8192)]
    return made


def load(peer: str, folder: Path, device: str = "cpu") -> Encode:
    """Load a peer and return its function from texts to dense vectors."""
    if peer.startswith("gte-rag"):
        from gte_rag import GTEEncoder

        encoder = GTEEncoder.from_pretrained(folder, precision=peer.split()[1], max_length=8192, device=device)
        return lambda texts: encoder.encode_documents(texts, sparse=False).dense
    if peer.startswith("sentence-transformers"):
        return _sentence_transformers(peer, folder, device)
    import numpy as np
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(8192)
    tokenizer.enable_padding(pad_id=1, pad_token="<pad>")  # noqa: S106  # not a password
    forward = _transformers(peer, folder, device) if peer.startswith("transformers") else _graph(peer, folder)
    batch_size = int(peer.split("batch ")[1].split()[0]) if "batch" in peer else 1

    def encode(texts: Sequence[str]) -> np.ndarray:
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
        rows: list[Any] = [None] * len(texts)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            encoded = tokenizer.encode_batch([texts[row] for row in batch])
            ids = np.array([one.ids for one in encoded], dtype=np.int64)
            mask = np.array([one.attention_mask for one in encoded], dtype=np.int64)
            for row, vector in zip(batch, forward(ids, mask), strict=True):
                rows[row] = vector / np.linalg.norm(vector)
        return np.stack(rows)

    return encode


def _sentence_transformers(peer: str, folder: Path, device: str) -> Encode:
    import torch
    from sentence_transformers import SentenceTransformer

    kwargs = {"float32": torch.float32, "bf16": torch.bfloat16}.get(peer.split()[1].rstrip(","))
    model = SentenceTransformer(str(folder), device=device, model_kwargs={"dtype": kwargs} if kwargs else {})
    options: dict[str, Any] = {"batch_size": 8} if "batch 8" in peer else {}
    return lambda texts: model.encode(list(texts), show_progress_bar=False, **options)


def _transformers(peer: str, folder: Path, device: str) -> Callable[[Any, Any], Any]:
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(
        folder,
        dtype=torch.bfloat16 if "bf16" in peer else torch.float32,
        attn_implementation="eager" if "eager" in peer else "sdpa",
    ).eval()
    model.to(device)

    def forward(ids: Any, mask: Any) -> Any:  # noqa: ANN401
        inputs = {"input_ids": torch.from_numpy(ids).to(device), "attention_mask": torch.from_numpy(mask).to(device)}
        with torch.inference_mode():
            return model(**inputs).last_hidden_state[:, 0].float().cpu().numpy()

    return forward


def _graph(peer: str, folder: Path) -> Callable[[Any, Any], Any]:
    graph = folder / ("model-int8.onnx" if "int8" in peer else "model.onnx")
    if peer.startswith("openvino"):
        import openvino

        hint = "bf16" if "bf16" in peer else "f32"
        compiled = openvino.Core().compile_model(str(graph), "CPU", {"INFERENCE_PRECISION_HINT": hint})
        return lambda ids, mask: compiled([ids, mask])[0]
    import onnxruntime

    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    return lambda ids, mask: session.run(None, {"input_ids": ids, "attention_mask": mask})[0]


def export(folder: Path) -> None:
    """Write the network as an ONNX graph that returns first tokens, in float32 and quantised dynamically."""
    import onnx
    import torch
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from transformers import AutoModel

    class First(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state[:, 0]

    if not (folder / "model.onnx").is_file():
        ids = torch.randint(5, 1000, (2, 17))
        batch, length = torch.export.Dim("batch", min=1, max=4096), torch.export.Dim("length", min=2, max=8192)
        shape = {0: batch, 1: length}
        torch.onnx.export(
            First(),
            (ids, torch.ones_like(ids)),
            str(folder / "draft.onnx"),
            input_names=["input_ids", "attention_mask"],
            dynamic_shapes={"input_ids": shape, "attention_mask": shape},
            dynamo=True,
            external_data=False,
        )
        (folder / "draft.onnx").rename(folder / "model.onnx")
    if not (folder / "model-int8.onnx").is_file():
        model = onnx.load(folder / "model.onnx")
        # Shapes that the exporter recorded disturb the quantiser's own shape inference.
        del model.graph.value_info[:]
        onnx.save(model, folder / "bare.onnx")
        quantize_dynamic(
            folder / "bare.onnx", folder / "draft-int8.onnx", weight_type=QuantType.QInt8, per_channel=True
        )
        (folder / "bare.onnx").unlink()
        (folder / "draft-int8.onnx").rename(folder / "model-int8.onnx")


def measure(peer: str, folder: Path, quick: bool, chosen_workloads: Sequence[str], device: str) -> dict[str, Any]:
    """Load one peer in this process and time its workloads, in seconds per call, and note how busy others were meanwhile."""
    busy, everything = _processor_time()
    start = time.perf_counter()
    encode = load(peer, folder, device)
    encode(["a short text"])
    result: dict[str, Any] = {"load": time.perf_counter() - start, "rss_loaded": _peak_rss(), "seconds": {}}
    only = peers(device)[peer][2]
    slow = is_slow(peer, device)
    for name, texts in workloads(folder / "tokenizer.json", quick, device).items():
        if (only is not None and name not in only) or (chosen_workloads and name not in chosen_workloads):
            continue
        if name == "query":
            chosen = texts[:3] if slow else texts
            times = [_seconds(encode, [text]) for text in chosen]
        else:
            if not slow and name != "document 8k":
                encode(texts[:8])  # buffers and kernels for these shapes
            times = [_seconds(encode, texts) for _ in range(1 if slow or "document" in name else 3)]
        result["seconds"][name] = statistics.median(times)
        if name == "passages":
            result["rss_passages"] = _peak_rss()
    result["rss"] = _peak_rss()
    if device != "cpu":
        import torch

        result["gpu"] = torch.cuda.max_memory_allocated()
    busy_after, everything_after = _processor_time()
    if everything_after > everything:
        own = time.process_time()  # since this process began, a moment before the first reading
        result["others"] = max(0.0, busy_after - busy - own) / (everything_after - everything)
    return result


def _processor_time() -> tuple[float, float]:
    """Return the seconds that all cores were busy, and those that have passed on all cores; zeros where nothing tells."""
    if not Path("/proc/stat").is_file():
        return 0.0, 0.0
    ticks = [int(value) for value in Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:9]]
    per_second = os.sysconf("SC_CLK_TCK")
    return (sum(ticks) - ticks[3] - ticks[4]) / per_second, sum(ticks) / per_second


def _seconds(encode: Encode, texts: Sequence[str]) -> float:
    start = time.perf_counter()
    encode(texts)
    return time.perf_counter() - start


def _peak_rss() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def gpu_ceilings(device: str, rows: int = 65_536) -> dict[str, float]:
    """Measure the network's four matrix products alone on a GPU, in products and sums per second."""
    import torch

    totals = {}
    for name, dtype in (("bf16", torch.bfloat16), ("float32", torch.float32)):
        pairs = [
            (
                torch.randn(rows, inner, device=device, dtype=dtype),
                torch.randn(outer, inner, device=device, dtype=dtype),
            )
            for inner, outer in SHAPES
        ]
        times = []
        for _ in range(12):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for x, weight in pairs:
                x @ weight.T
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        totals[name] = sum(2 * rows * inner * outer for inner, outer in SHAPES) / statistics.median(times[2:])
    return totals


def ceilings() -> dict[str, float]:
    """Measure the network's four matrix products alone at 512 rows, in products and sums per second."""
    import torch

    from gte_rag.model import Linear
    from gte_rag.precision import Int8Linear, PackedLinear, quantise, resolve

    rows = 512
    operations = sum(2 * rows * inner * outer for inner, outer in SHAPES)
    totals: dict[str, list[float]] = {}
    with torch.inference_mode():
        products: dict[str, list[Callable[[], Any]]] = {}
        for inner, outer in SHAPES:
            linear, x = Linear(inner, outer, bias=False), torch.randn(rows, inner)
            low, weight, out = x.bfloat16(), linear.weight.bfloat16(), torch.empty(rows, outer)
            products.setdefault("float32", []).append(lambda x=x, w=linear.weight, out=out: torch.mm(x, w.T, out=out))
            products.setdefault("bf16", []).append(lambda x=low, w=weight: torch.mm(x, w.T))
            packed = PackedLinear(linear, torch.float32)
            products.setdefault("float32 packed", []).append(lambda x=x, f=packed: f(x))
            packed = PackedLinear(linear, torch.bfloat16)
            products.setdefault("bf16 packed", []).append(lambda x=low, f=packed: f(x))
            try:
                resolve("int8", torch.device("cpu"))
            except ValueError:
                continue
            levels, eight = quantise(x)[0], Int8Linear(linear)
            products.setdefault("int8", []).append(lambda x=levels, f=eight: f.product(x))
            products.setdefault("int8 with quantisation", []).append(lambda x=x, f=eight: f.product(quantise(x)[0]))
        for _ in range(9):
            for name, calls in products.items():
                start = time.perf_counter()
                for call in calls:
                    call()
                totals.setdefault(name, []).append(time.perf_counter() - start)
    return {name: operations / statistics.median(times[1:]) for name, times in totals.items()}


def soak(texts: int) -> dict[str, Any]:
    """Stream many passages through the bundled model and record the resident memory on the way."""
    import numpy as np

    from gte_rag import GTEEncoder

    encoder = GTEEncoder.from_pretrained()
    random = np.random.default_rng(0)
    words = [encoder.tokenizer.id_to_token(token).lstrip("▁") for token in range(1000, 9000)]
    passages = (
        " ".join(words[place] for place in random.integers(len(words), size=random.integers(20, 200)))
        for _ in range(texts)
    )
    resident = []
    for _ in encoder.encode_stream(passages):
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        resident.append(pages * os.sysconf("SC_PAGE_SIZE"))
    return {"texts": texts, "resident": resident, "peak": _peak_rss()}


def _run(arguments: list[str], keep_memory: bool = False) -> Any:  # noqa: ANN401
    path = [HERE.parent, HERE, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = os.environ | (KEEP_MEMORY if keep_memory else {})
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run(  # noqa: S603
        [sys.executable, __file__, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        print(f"{arguments} failed: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def _without_checkpoint(arguments: list[str]) -> list[str]:
    """Leave out where the checkpoint lies, which says nothing to others."""
    if "--checkpoint" not in arguments:
        return arguments
    at = arguments.index("--checkpoint")
    return arguments[:at] + arguments[at + 2 :]


def _machine(device: str) -> dict[str, str]:
    model = platform.processor()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    commit = subprocess.run(  # noqa: S603
        ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
    )
    packages = ("torch", "transformers", "sentence-transformers", "onnxruntime", "openvino", "tokenizers", "numba")
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    import torch

    return {
        "processor": f"{model}, {os.cpu_count()} cores",
        **({"GPU": torch.cuda.get_device_name()} if device != "cpu" else {}),
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "command": " ".join(["python", "benchmarks/speed.py", *_without_checkpoint(sys.argv[1:])]),
        "date": time.strftime("%Y-%m-%d"),
        **versions,
    }


def main() -> None:
    """Parse arguments, run all peers in turn, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer peers and texts, one round")
    parser.add_argument("--rounds", type=int, help="default 3, or 1 with --quick")
    parser.add_argument("--checkpoint", type=Path, default=HERE / "checkpoint", help="where the random checkpoint lies")
    parser.add_argument("--only", nargs="*", default=[], help="peers whose names contain one of these words")
    parser.add_argument("--workloads", nargs="*", default=[], help="measure these only")
    parser.add_argument("--add", action="store_true", help="keep what the results file has beside what is measured now")
    parser.add_argument("--one-way", action="store_true", help="not also with a malloc that keeps memory")
    parser.add_argument("--soak", type=int, default=0, help="also stream this many passages and record memory")
    parser.add_argument("--name", default="speed", help="name of the files in benchmarks/results")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        jobs: dict[str, Callable[[], Any]] = {
            "ceilings": ceilings if options.device == "cpu" else lambda: gpu_ceilings(options.device),
            "soak": lambda: soak(options.soak),
            "export": lambda: export(options.checkpoint),
        }
        job = jobs.get(
            options.job,
            lambda: measure(options.job, options.checkpoint, options.quick, options.workloads, options.device),
        )
        print(f"\n{json.dumps(job())}")
        return
    sys.path.insert(0, str(HERE.parent))
    from base_checkpoint import write

    folder = write(options.checkpoint)
    there = peers(options.device)
    names = [name for name in there if not options.only or any(word in name for word in options.only)]
    names = [
        name
        for name in names
        if (there[name][1] or not options.quick)
        and all(importlib.util.find_spec(package) is not None for package in there[name][0])
    ]
    common = ["--checkpoint", str(folder), "--device", options.device, *(["--quick"] if options.quick else [])]
    if options.workloads:
        common += ["--workloads", *options.workloads]
        names = [name for name in names if not set(options.workloads).isdisjoint(there[name][2] or options.workloads)]
    if any(name.startswith(("onnx", "openvino")) for name in names):
        _run(["--job", "export", *common])
    measured: dict[str, list[dict[str, Any]]] = {}
    limits: dict[str, list[float]] = {}
    for turn in range(options.rounds or (1 if options.quick else 3)):
        for name, speed in (_run(["--job", "ceilings", *common]) or {}).items():
            limits.setdefault(name, []).append(speed)
        for name in names:
            if turn and is_slow(name, options.device):
                continue
            # Other packages are measured both ways; this one as it comes.
            ways = (
                (False,)
                if name.startswith("gte-rag")
                or is_slow(name, options.device)
                or options.quick
                or options.one_way
                or options.device != "cpu"
                else (False, True)
            )
            for keep in ways:
                result = _run(["--job", name, *common], keep)
                if result is not None:
                    measured.setdefault(name + (" (malloc keeps memory)" if keep else ""), []).append(result)
                    print(f"round {turn + 1}  {name}{' +malloc' if keep else ''}  {result['seconds']}", file=sys.stderr)
    machine = _machine(options.device)
    earlier = RESULTS / f"{options.name}.json"
    commands = [machine.pop("command")]
    if options.add and earlier.is_file():
        kept = json.loads(earlier.read_text(encoding="utf-8"))
        commands = kept["machine"]["commands"] + commands
        for name, peer in kept["peers"].items():
            measured[name] = peer["all"] + measured.get(name, [])
        for name, speeds in kept["all_ceilings"].items():
            limits[name] = speeds + limits.get(name, [])
    report = _summarise(measured, limits, folder, options.quick, options.device)
    report["all_ceilings"] = limits
    report["machine"] = machine | {"commands": commands}
    if options.add and earlier.is_file() and "soak" in kept:
        report["soak"] = kept["soak"]
    if options.soak:
        report["soak"] = _run(["--job", "soak", "--soak", str(options.soak)])
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{options.name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    table = _table(report)
    (RESULTS / f"{options.name}.md").write_text(table, encoding="utf-8")
    print(table)
    if importlib.util.find_spec("matplotlib") is not None:
        _plot(report, RESULTS / f"{options.name}.png")


def _summarise(
    measured: dict[str, list[dict[str, Any]]], limits: dict[str, list[float]], folder: Path, quick: bool, device: str
) -> dict[str, Any]:
    from tokenizers import Tokenizer

    from base_checkpoint import FFN, HIDDEN, LAYERS

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    lengths = {
        name: [len(one.ids) for one in tokenizer.encode_batch(texts)]
        for name, texts in workloads(folder / "tokenizer.json", quick, device).items()
    }
    per_token = 2 * LAYERS * HIDDEN * (4 * HIDDEN + 3 * FFN)
    operations = {
        name: sum(length * per_token + 4 * LAYERS * HIDDEN * length**2 for length in counts)
        for name, counts in lengths.items()
    }
    summary: dict[str, Any] = {}
    for name, results in measured.items():
        seconds = {
            workload: statistics.median(result["seconds"][workload] for result in _calm(results, workload))
            for workload in lengths
            if any(workload in result["seconds"] for result in results)
        }
        summary[name] = {
            "seconds": seconds,
            "tokens_per_second": {
                workload: sum(lengths[workload]) / spent for workload, spent in seconds.items() if workload != "query"
            },
            "operations_per_second": {
                workload: operations[workload] / spent for workload, spent in seconds.items() if workload != "query"
            },
            **{
                key: statistics.median(result[key] for result in results if key in result)
                for key in ("load", "rss_loaded", "rss_passages", "rss", "gpu", "others")
                if any(key in result for result in results)
            },
            "all": results,
        }
    return {
        "tokens": {name: sum(counts) for name, counts in lengths.items()},
        "ceilings": {name: statistics.median(speeds) for name, speeds in limits.items()},
        "peers": summary,
    }


def _calm(results: list[dict[str, Any]], workload: str) -> list[dict[str, Any]]:
    """Return the measurements of a workload; of several, those during which others took little of the processor."""
    found = [result for result in results if workload in result["seconds"]]
    return [result for result in found if result.get("others", 0.0) <= CALM] or found


def _table(report: dict[str, Any]) -> str:
    machine = report["machine"]
    lines = [
        f"# Speed on {machine.get('GPU', machine['processor'])}",
        "",
        *(f"- {key}: {value}" for key, value in machine.items()),
        "",
    ]
    rows = "65,536" if "GPU" in machine else "512"
    lines += [f"Matrix products alone, {rows} rows, the network's shapes:", ""]
    lines += [f"- {name}: {speed / 1e9:.0f} GOP/s" for name, speed in report["ceilings"].items()] + [""]
    names = list(report["tokens"])
    ours = {
        workload: min(
            (
                peer["seconds"][workload]
                for name, peer in report["peers"].items()
                if name.startswith("gte-rag") and workload in peer["seconds"]
            ),
            default=float("nan"),
        )
        for workload in names
    }
    lines += [
        "Tokens per second (one query: milliseconds); in brackets the time relative to this package's best precision. "
        "Share: operations of the passages (and of the documents on a GPU), attention included, per second, of the fastest "
        "product of that kind. "
        "Others: processor time that other processes took meanwhile.",
        "",
        "| | " + " | ".join(names) + " | share | others | load s | peak MB |",
        "|---" * (len(names) + 5) + "|",
    ]
    for name, peer in report["peers"].items():
        cells = []
        for workload in names:
            spent = peer["seconds"].get(workload)
            if spent is None:
                cells.append("–")
                continue
            value = f"{spent * 1e3:.1f} ms" if workload == "query" else f"{peer['tokens_per_second'][workload]:,.0f}"
            cells.append(f"{value} ({spent / ours[workload]:.2f}x)")
        kind = next((kind for kind in ("int8", "bf16", "float32") if kind in name), None)
        speeds = [speed for limit, speed in report["ceilings"].items() if kind and limit.startswith(kind)]
        done = [peer["operations_per_second"].get(name) for name in ("passages", "documents 4.5k")]
        share = ", ".join(f"{speed / max(speeds):.0%}" for speed in done if speed) if speeds else ""
        cells += [
            share or "–",
            f"{peer.get('others', 0):.0%}",
            f"{peer['load']:.1f}",
            f"{peer.get('gpu', peer.get('rss_passages', peer['rss'])) / 2**20:,.0f}",
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    if report.get("soak"):
        resident = [size / 2**20 for size in report["soak"]["resident"]]
        lines += [
            "",
            f"Resident memory while {report['soak']['texts']:,} passages stream through gte-mini: {resident[0]:,.0f} MB "
            f"after the first batch, {resident[len(resident) // 2]:,.0f} MB half-way, {resident[-1]:,.0f} MB at the end.",
        ]
    return "\n".join(lines) + "\n"


def _plot(report: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [name for name in report["tokens"] if name != "query"]
    figure, axes = pyplot.subplots(1, len(shown), figsize=(5 * len(shown), 1 + 0.3 * len(report["peers"])), sharey=True)
    for axis, workload in zip(axes, shown, strict=True):
        bars = [(name, peer["tokens_per_second"].get(workload, 0)) for name, peer in report["peers"].items()][::-1]
        axis.barh(
            [name for name, _ in bars],
            [speed for _, speed in bars],
            color=["#1b7f5c" if name.startswith("gte-rag") else "#9aa5b1" for name, _ in bars],
        )
        axis.set_title(f"{workload}: tokens / s")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
