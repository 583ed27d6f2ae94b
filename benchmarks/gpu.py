"""PyTorch on an accelerator: the same grids, codes and files as on the CPU, and what quantization costs there.

    pip install "bitwright[torch]" pytest
    python benchmarks/gpu.py [--device cuda] [--size 224] [--batch 32] [--repeats 5] [--out gpu.json]

A few minutes. Prints a line for each comparison with the CPU, with "FAIL" where the two don't agree: fake quantization
of 4 million values and midpoints (bit by bit), and of MobileNetV2 (random weights) and a small transformer the grids
after calibration, codes of weights (bit by bit), simulated outputs in decibels, a rounding technique, training with
learned ranges, the exported files; then the backend contract of the tests with all models on the device. Then seconds
and ratios: simulated pass, calibration and training steps to the float ones on the device, GPTQ to the CPU's. `--out`
keeps all of it. Exit code 1 if a comparison fails. TF32 is off: it rounds float products to 10 bits, which no CPU does.

Try it first without one: `--device cpu --size 64 --batch 8` runs every line, and `--device meta`, which computes shapes
alone but refuses to mix devices as a GPU does, runs the simulated and the trainable models there.
"""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cost
import numpy as np
import torch
from cost_torch import mobilenet_v2, train_step
from torch import nn

from bitwright.grids import Encoding, PerTensor
from bitwright.simulation import QuantSim

ROOT = Path(__file__).parents[1]
checks = {}


def check(what, ok, figure):
    print(f"{'ok  ' if ok else 'FAIL'}  {what:58} {figure}", flush=True)
    checks[what] = {"ok": bool(ok), "figure": figure}


def decibels(signal, noisy):
    a, b = np.asarray(signal, np.float64), np.asarray(noisy, np.float64)
    noise = np.square(a - b).sum()
    return 200.0 if noise == 0 else 10 * np.log10(np.square(a).sum() / noise)


class Encoder(nn.Module):
    """Token embedding, one attention block with a causal mask made in `forward`, a head."""

    def __init__(self, width=64, heads=4, words=500):
        super().__init__()
        self.embed, self.norm = nn.Embedding(words, width), nn.LayerNorm(width)
        self.qkv, self.out, self.head = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.Linear(width, words)
        self.heads = heads

    def forward(self, ids):
        x = self.embed(ids)
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm(x)).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mask = torch.ones(t, t, dtype=torch.bool, device=x.device).tril()
        scores = (q @ k.transpose(-1, -2)) * (d // self.heads) ** -0.5
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        return self.head(x + self.out((weights @ v).transpose(1, 2).reshape(n, t, d)))


def agree(label, module, batch, device, **options):
    """Open, calibrate and run on both devices; returns the two simulations."""
    sims = {}
    for where in ("cpu", device):
        here, x = copy.deepcopy(module).to(where), batch.to(where)
        sims[where] = QuantSim(here, x, **options).calibrate([x])
    cpu, gpu = sims["cpu"], sims[device]
    check(f"{label}: plans", dict(cpu.plan) == dict(gpu.plan), f"{len(cpu.plan)} sites")
    scales = [np.max(np.abs(e.scale / gpu.table[s].scale - 1)) for s, e in cpu.table.items()]
    check(f"{label}: scales apart (largest, relative)", max(scales) < 1e-3, f"{max(scales):.2g}")
    same = all(
        np.array_equal(cpu.table[p].quantize(cpu.params[p]), gpu.table[p].quantize(gpu.params[p]))
        for p in cpu.plan.parameters
    )
    check(f"{label}: codes of weights", same, f"{len(cpu.plan.parameters)} weights, bit by bit")
    gpu.set({s: cpu.encodings[s] for s in gpu.plan.activations})
    outputs = {w: s.predict([batch])[0] for w, s in sims.items()}
    figure = decibels(outputs["cpu"], outputs[device])
    check(f"{label}: simulated output, one set of grids", figure > 25, f"{figure:.1f} dB")
    return cpu, gpu


def midpoints(device):
    """Values on, and beside, the midpoints between grid points: composed and compiled against numpy, bit by bit."""
    from bitwright_torch.simulate.kernels import composed_forward, kernels

    rng = np.random.default_rng(0)
    codes = rng.integers(-20, 280, 2_000_000).astype(np.float32)
    encoding = Encoding(8, False, False, np.float32(0.0372), np.int32(17), PerTensor())
    edges = (codes + np.float32(0.5)) * encoding.scale
    values = np.concatenate([edges, np.nextafter(edges, np.float32(99)), rng.normal(5, 4, 10**6).astype(np.float32)])
    expected = encoding.fake_quantize(values)
    x = torch.as_tensor(values, device=device)
    ends = [torch.tensor(float(v), device=device) for v in (encoding.scale, 0 - 17, 255 - 17)]
    os.environ["BITWRIGHT_TORCH_KERNELS"] = "compiled"
    for label, found in (("composed", composed_forward(x, *ends)), ("as used", kernels("forward", x, *ends))):
        differ = int((found.cpu().numpy() != expected).sum())
        check(f"fake quantization of {len(values):,} values, {label}", differ == 0, f"{differ} differ")
    print(f"      kernels in use: {kernels.state()}")


def trained(sim, batch, labels):
    """Loss before and after 20 steps with learned ranges; the grids and the weights are taken over."""
    model = sim.trainable(range_learning=True)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(batch).flatten(0, -2), labels.flatten())
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    sim.take()
    return losses[0], losses[-1]


def contract(device):
    """The tests of the backend contract, models and data on the device."""
    clean = {**os.environ, "BITWRIGHT_TORCH_DEVICE": device}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        str(ROOT / "tests/torch/test_torch_contract.py"),
    ]
    done = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, check=False)
    for line in re.findall(r"^(?:FAILED|ERROR) .*", done.stdout, re.M):
        print(f"      {line[:200]}")
    closing = (done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["nothing"])[-1]
    check("backend contract", done.returncode == 0, closing.strip("= "))


def on_meta(label, module, batch, **options):
    """Whether what was captured and simulated on the CPU keeps to the device that it is moved to."""
    sim = QuantSim(module, batch, **options).calibrate([batch])
    for kind, model in (("simulated", sim.model), ("range learning", sim.trainable(range_learning=True))):
        try:
            found = str(copy.deepcopy(model).to("meta")(batch.to("meta")).device)
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        check(f"{label}, {kind}, moved to meta", found == "meta", found)


def main():
    parser = cost.parser(__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, cpu, meta or another that PyTorch has")
    parser.add_argument("--out", type=Path, help="a JSON file")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    begin, device = time.perf_counter(), options.device
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    print(f"{name}, torch {torch.__version__}")
    net = mobilenet_v2().train()
    images, ids = torch.randn(options.batch, 3, options.size, options.size), torch.randint(0, 500, (8, 32))
    with torch.no_grad():
        net(images)
    net.eval()
    if device == "meta":
        on_meta("MobileNetV2", net, images)
        on_meta("transformer", Encoder().eval(), ids, activations="uint16")
        seconds = {}
    else:
        midpoints(device)
        seconds = compared(net, images, ids, device)
        contract(device)
        seconds |= costs(net.to(device), images.to(device), options)
    failures = [what for what, found in checks.items() if not found["ok"]]
    print("all agree" if not failures else f"{len(failures)} of the comparisons FAILED")
    if options.out:
        kept = {"device": name, "torch": torch.__version__, "size": options.size, "batch": options.batch,
                "wall_seconds": time.perf_counter() - begin, "checks": checks, "seconds": seconds}  # fmt: skip
        options.out.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    sys.exit(bool(failures))


def compared(net, images, ids, device):
    """The comparisons of both networks; seconds of GPTQ on the transformer, on the CPU and on the device."""
    _, gpu = agree("MobileNetV2", net, images, device)
    text_cpu, text_gpu = agree("transformer", Encoder().eval(), ids, device, activations="uint16")
    seconds = {}
    for label, sim, batch in (("CPU", text_cpu, ids), ("device", text_gpu, ids.to(device))):
        begin = time.perf_counter()
        sim.apply("gptq", [batch])
        seconds[f"gptq, {label}"] = time.perf_counter() - begin
        sim.calibrate([batch])
    figures = [decibels(s.predict([ids], simulated=False)[0], s.predict([ids])[0]) for s in (text_cpu, text_gpu)]
    check("gptq on the transformer: dB on CPU and device", abs(figures[0] - figures[1]) < 0.5,
          f"{figures[0]:.1f}, {figures[1]:.1f}")  # fmt: skip
    first, last = trained(text_gpu, ids.to(device), ids.to(device))
    check("training with learned ranges: loss falls", last < first, f"{first:.3f} → {last:.3f}")
    with tempfile.TemporaryDirectory() as folder:
        bundle = gpu.export(Path(folder), name="net")
        check("export from the device", {"model", "encodings", "qdq"} <= set(bundle.files), ", ".join(bundle.files))
        gpu.save(Path(folder) / "state")
        again = QuantSim.load(Path(folder) / "state")
        figure = decibels(gpu.predict([images])[0], again.predict([images])[0])
        check("saved on the device, loaded on the CPU", figure > 25, f"{figure:.1f} dB")
    return seconds


def costs(net, x, options):
    """Seconds and ratios on the device."""
    wait = torch.cuda.synchronize if options.device.startswith("cuda") else lambda: None

    def timed(run):
        def task():
            with torch.inference_mode():
                run(x)
            wait()

        return task

    def waited(run):
        def task():
            run()
            wait()

        return task

    y = torch.randint(0, 1000, (len(x),), device=x.device)
    sim = QuantSim(net, x, scheme="minmax").apply("fold_batch_norm").calibrate([x])
    tasks = {
        "float pass": timed(net),
        "simulated pass": timed(sim.model),
        "calibration, minmax, a batch": cost.calibration(sim, [x]),
        "calibration, sqnr, a batch": cost.calibration(QuantSim(net, x).apply("fold_batch_norm").calibrate([x]), [x]),
    }
    found = cost.interleaved(tasks, options.repeats, options.clock)
    qat = QuantSim(net, x, scheme="minmax").calibrate([x])
    steps = {
        "float step": waited(train_step(copy.deepcopy(net), x, y)),
        "QAT step, regular": waited(train_step(qat.fork().trainable(), x, y)),
        "QAT step, range learning": waited(train_step(qat.fork().trainable(range_learning=True), x, y)),
    }
    found |= cost.interleaved(steps, max(options.repeats // 2, 2), options.clock)
    begin = time.perf_counter()
    sim.fork().apply("gptq", [x])
    found["gptq, MobileNetV2, device"] = time.perf_counter() - begin
    here = QuantSim(net.to("cpu"), x.cpu(), scheme="minmax").apply("fold_batch_norm").calibrate([x.cpu()])
    begin = time.perf_counter()
    here.apply("gptq", [x.cpu()])
    found["gptq, MobileNetV2, CPU"] = time.perf_counter() - begin
    bases = {"step": "float step", "gptq": "gptq, MobileNetV2, CPU"}
    cost.show(found, lambda name: next((b for part, b in bases.items() if part in name), "float pass"))
    return found


if __name__ == "__main__":
    main()
