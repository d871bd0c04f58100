"""The report of gpu.py: a table for each part, the conditions of each call, a picture of the losses."""

import statistics

from benchmarks.gpu_parts import PARTS
from minzero import benchmark
from minzero.cards import peak_flops
from minzero.files import write_atomically
from minzero.planner.units import in_units
from minzero.plot import pyplot

SPEED = {
    "tokens/s": ("tokens_per_second", "{:,.0f}".format),
    "micro-batch": ("micro_batch_size", str),
    "of nanoGPT's best": ("of_nanogpt", "{:.2f}".format),
    "MFU": ("mfu", "{:.1%}".format),
    "of products": ("of_products", "{:.1%}".format),
}
SPEED |= {head: benchmark.COLUMNS[head] for head in ("step, s", "slowest, s", "allocated", "reserved", "predicted")}
SPEED["tokens a step"] = ("global_batch_tokens", "{:,}".format)
SPEED["mean of steps"] = ("all_step_seconds", lambda seconds: str(len(seconds)))
MEMORY = {head: benchmark.COLUMNS[head] for head in ("allocated", "reserved", "CPU memory", "predicted", "error")}
STEP = {head: benchmark.COLUMNS[head] for head in ("tokens/s", "step, s")}
STEP |= {head: SPEED[head] for head in ("micro-batch", "tokens a step", "mean of steps")}
COLUMNS = {
    "speed": SPEED,
    "kernels": {
        "torch, ms": ("torch_ms", "{:.3f}".format),
        "this, ms": ("rival_ms", "{:.3f}".format),
        "times as fast": ("times_as_fast", "{:.2f}".format),
        "largest relative difference": ("largest_difference", "{:.1e}".format),
    },
    "memory": {"published for 1 GPU": ("published", str)} | MEMORY | STEP,
    "offload": STEP | MEMORY,
    "planner": MEMORY | STEP,
    "options": STEP | {"MFU": SPEED["MFU"]} | MEMORY,
    "convergence": {
        "last loss": ("last_loss", "{:.5f}".format),
        "steps": ("steps", str),
        "largest relative difference of a loss from that of ZeRO-3": ("from_stage3", "{:.1e}".format),
    },
    "parity": {
        "loss: eager": ("eager_loss", "{:.1e}".format),
        "loss: compiled": ("compiled_loss", "{:.1e}".format),
        "gradients: eager": ("eager_gradients", "{:.2%}".format),
        "gradients: compiled": ("compiled_gradients", "{:.2%}".format),
        "gradients: loop over experts": ("loop_gradients", "{:.2%}".format),
        "furthest off, eager": ("eager_furthest", str),
        "furthest off, compiled": ("compiled_furthest", str),
        "a second pass, eager": ("eager_again", str),
        "a second pass, compiled": ("compiled_again", str),
        "attention, eager": ("eager_attention", str),
        "attention, compiled": ("compiled_attention", str),
        "ms: eager": ("eager_ms", "{:.2f}".format),
        "ms: compiled": ("compiled_ms", "{:.2f}".format),
        "ms: loop over experts": ("loop_ms", "{:.2f}".format),
        "peak, eager": ("eager_allocated_bytes", in_units),
        "peak, compiled": ("compiled_allocated_bytes", in_units),
        "compiling, s": ("compile_seconds", "{:.1f}".format),
        "graph breaks": ("graph_breaks", str),
        "raised": ("raised", str),
    },
}
# of `speed`: not to be compared with nanoGPT's 124M
OTHER_SIZES = ("1p5b", "few_tokens_1p7b", "llama", "qwen3", "smollm2", "olmoe")


def losses_apart(found, expected):
    """The largest relative difference between two lists of losses."""
    return max(abs(one - other) / abs(other) for one, other in zip(found, expected, strict=False))


def with_ratios(part, results, rate):
    """The part's results, {name: result}, as a list, with numbers that compare several of them. rate: result -> FLOP/s
    of large matrix products in the call that measured it, or None."""
    if part == "speed":
        return speed_ratios(results, rate)
    if part == "convergence":
        return loss_differences(results)
    if part == "parity":
        return each_model(results)
    return list(results.values())


def speed_ratios(results, rate):
    """of_nanogpt: tokens/s as a share of nanoGPT's best row (124M models only); of_products: FLOP/s as a share of
    large products'."""
    nanogpt = [result.get("tokens_per_second") or 0 for name, result in results.items() if name.startswith("nanogpt")]
    best = max(nanogpt, default=0)
    rows = []
    for name, result in results.items():
        more = {}
        if speed := result.get("tokens_per_second"):
            if best and not name.startswith(OTHER_SIZES):
                more["of_nanogpt"] = speed / best
            if rate(result):
                more["of_products"] = speed * result["flops_per_token"] / rate(result)
        rows.append(result | more)
    return rows


def loss_differences(results):
    """from_stage3: how far the losses are from those of the row stage3, of Muon from those of muon_stage3."""
    rows = []
    for name, result in results.items():
        expected = results.get("muon_stage3" if name.startswith("muon") else "stage3", {}).get("losses")
        more = {}
        if losses := result.get("losses"):
            more = {"last_loss": losses[-1], "steps": len(losses)}
            more["from_stage3"] = losses_apart(losses, expected) if expected else None
        rows.append(result | more)
    return rows


def each_model(results):
    """A row for each model of `parity`, and one for each process that failed. `raised` is the error of a model of which
    something was measured before; one without any has it as `failed`."""
    rows = []
    for result in results.values():
        for title, found in result.get("models", {}).items():
            row = {"call": result.get("call")} | found | {"title": title, "failed": None}
            reason = found.get("failed")
            row["raised" if "eager_loss" in found else "failed"] = reason
            for mode in ("eager", "compiled"):
                if f"{mode}_loss" in found:
                    row[f"{mode}_furthest"] = f"{found[f'{mode}_worst_name']} {found[f'{mode}_worst']:.2%}"
                    row[f"{mode}_again"] = repeated_in_words(found, mode)
            rows.append(row)
        if result["failed"]:
            rows.append({"title": result["title"], "failed": result["failed"], "call": result.get("call")})
    return rows


def repeated_in_words(found, mode):
    """Whether two passes from the same state gave the same gradients, to the last bit."""
    if others := found[f"{mode}_repeated_otherwise"]:
        return f"{found[f'{mode}_repeated']:.1e} in {len(others)} parameters"
    return "same bits"


def draw_losses(results, picture):
    """The losses of `convergence`, and how far each is from ZeRO-3's."""
    plt = pyplot()

    figure, (losses_axes, differences_axes) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    expected = results.get("stage3", {}).get("losses")
    for number, result in enumerate(results.values()):
        losses = result.get("losses") or []
        losses_axes.plot(range(1, len(losses) + 1), losses, f"C{number}.-", label=result["title"])
        if expected and result is not results["stage3"]:
            pairs = enumerate(zip(losses, expected, strict=False), 1)
            apart = {step: abs(one - other) / other for step, (one, other) in pairs if one != other}
            differences_axes.plot(apart.keys(), apart.values(), f"C{number}.-", label=result["title"])
    losses_axes.set(ylabel="loss, nats per token")
    losses_axes.legend(fontsize=8)
    differences_axes.set(ylabel="relative difference from ZeRO-3's", xlabel="step, where they differ", yscale="log")
    differences_axes.xaxis.set_major_locator(plt.matplotlib.ticker.MaxNLocator(integer=True))
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def write_report(bench, folder, calls):
    """FOLDER/report.md and its picture, of what is measured so far. calls: the conditions of each call."""
    title = "Measurements on a GPU"
    if bench.tiny:
        title = "--tiny: that everything runs; the figures mean nothing"
    lines = [f"# {title}", ""]
    for number, call in enumerate(calls, 1):
        lines += call_lines(number, call)
    for part, rows in PARTS.items():
        lines += [f"## {part}", "", " ".join(rows.__doc__.split()), ""]
        names = [row.name for row in rows(bench)]
        results = {name: bench.rows[f"{part}/{name}"] for name in names if f"{part}/{name}" in bench.rows}
        if results:
            lines += part_lines(bench, part, results, calls)
        if part == "convergence" and any(result.get("losses") for result in results.values()):
            draw_losses(results, folder / "convergence.png")
            lines += ["![losses](convergence.png)", ""]
        if missing := [name for name in names if name not in results]:
            lines += [f"Not measured yet: {', '.join(missing)}.", ""]
    write_atomically(folder / "report.md", "\n".join(lines).encode())


def call_lines(number, call):
    """The conditions of one call."""
    versions = ", ".join(f"{name} {text}" for name, text in call["versions"].items())
    line = f"Call {number}: {call['device']}; {call['began']}; {versions}; data: {call['data']}"
    if rate := call.get("product_flops"):
        line += f"; bf16 products of large matrices: {rate / 1e12:.4g} TFLOP/s"
    return [line, "", f"`{call['command']}`", ""]


def part_lines(bench, part, results, calls):
    """A part's table and the notes that it needs."""

    def product_rate(result):
        return calls[result["call"] - 1].get("product_flops")

    columns = dict(COLUMNS[part])
    if len(calls) > 1:
        columns["call"] = ("call", str)
    rows = with_ratios(part, results, product_rate)
    rows = [row for row in rows if row["failed"] or "profile" not in row]
    lines = [*benchmark.table(rows, columns), ""]
    errors = [abs(result["error"]) for result in results.values() if result.get("error") is not None]
    if part == "planner" and errors:
        lines += [f"Median error, without its sign: {statistics.median(errors):.1%} of {len(errors)} rows.", ""]
    runs = {f"{row['precision']}, kernels {row['kernels']}" for row in results.values() if row.get("kernels")}
    if runs:
        lines += [f"Runs of train.py: {'; '.join(sorted(runs))}.", ""]
    peak = peak_flops(calls[-1]["device"])
    if part == "speed" and peak:
        lines += [f"MFU is of {peak / 1e12:g} TFLOP/s, the data sheet's dense bf16; products: see the call.", ""]
    if part == "planner" and not bench.gpus:
        lines += ["There is no error without a GPU: resident memory is no measure of tensors.", ""]
    for result in results.values():
        if result.get("profile"):
            lines += ["```", result["profile"].rstrip(), "```", ""]
    return lines
