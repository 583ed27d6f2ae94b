"""What quantization costs beside a float pass in PyTorch: MobileNetV2, 224², batch 8, two threads, one run.

    pip install "bitwright[torch]"
    python benchmarks/cost_torch.py [--repeats 5] [--size 224] [--threads 2] [--clock wall] [--memory steady] [--aimet]

Prints a line for each figure: seconds, and the ratio to the float pass (or step) of the same run. Weights are random:
time doesn't depend on them. Float is the user's module, batch norms and all; the simulation has them folded.
Memory is allocated steadily (see `cost.STEADY`), unless `--memory default` leaves it to the system.
With --aimet, AIMET-torch (`pip install aimet-torch`, measured: 2.42) does the same on a folded copy; its calibration
is `compute_encodings` over the batch.
"""

from __future__ import annotations

import copy
import os

os.environ.setdefault("BITWRIGHT_TORCH_KERNELS", "compiled")

import cost
import torch
from torch import nn

from bitwright.simulation import QuantSim

# expansion, channels out, repeats, stride (Sandler et al. 2018, table 2)
STAGES = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]


def unit(cin, cout, kernel=1, stride=1, groups=1, act=True):
    layers = [nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(cout)]
    return [*layers, nn.ReLU6(inplace=True)] if act else layers


class Block(nn.Module):
    def __init__(self, cin, cout, expansion, stride):
        super().__init__()
        mid = cin * expansion
        expand = unit(cin, mid) if expansion > 1 else []
        self.body = nn.Sequential(*expand, *unit(mid, mid, 3, stride, mid), *unit(mid, cout, act=False))
        self.skip = stride == 1 and cin == cout

    def forward(self, x):
        return x + self.body(x) if self.skip else self.body(x)


def mobilenet_v2(classes=1000):
    layers, cin = unit(3, 32, 3, 2), 32
    for expansion, cout, repeats, stride in STAGES:
        for i in range(repeats):
            layers.append(Block(cin, cout, expansion, stride if i == 0 else 1))
            cin = cout
    layers += [*unit(cin, 1280), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(1280, classes)]
    return nn.Sequential(*layers)


def train_step(model, x, y):
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9)

    def step():
        model.train()
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def main():
    parser = cost.parser(__doc__.splitlines()[0])
    parser.add_argument("--aimet", action="store_true", help="measure AIMET-torch beside it")
    parser.add_argument("--memory", choices=("steady", "default"), default="steady", help="see cost.STEADY")
    options = parser.parse_args()
    if options.memory == "steady":
        cost.steady_memory()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    module = mobilenet_v2().eval()
    x, y = torch.randn(options.batch, 3, options.size, options.size), torch.randint(0, 1000, (options.batch,))
    with torch.no_grad():
        module.train()
        module(x)
        module.eval()

    def float_pass():
        with torch.inference_mode():
            module(x)

    tasks = {"float pass": float_pass}
    sims = {}
    for scheme in ("minmax", "sqnr"):
        sim = QuantSim(module, x, weights="int8", activations="uint8", scheme=scheme)
        sims[scheme] = sim.apply("fold_batch_norm").calibrate([x])
        tasks[f"calibration, {scheme}, a batch"] = cost.calibration(sims[scheme], [x])
    simulated = sims["minmax"].model

    def simulated_pass():
        with torch.inference_mode():
            simulated(x)

    tasks["simulated pass"] = simulated_pass
    theirs = {scheme: aimet(module, x, scheme) for scheme in ("min_max", "tf_enhanced")} if options.aimet else {}
    for scheme, peer in theirs.items():
        tasks[f"AIMET calibration, {scheme}"] = lambda peer=peer: peer.compute_encodings(forward(x))
    if theirs:
        tasks["AIMET simulated pass"] = lambda: forward(x)(theirs["min_max"].model)
    found = cost.interleaved(tasks, options.repeats, options.clock)
    # All of it: weights, the pass, and the search of each site's range.
    whole = {f"calibrate(), {n}, one batch": lambda sim=sim: sim.calibrate([x]) for n, sim in sims.items()}
    found |= cost.interleaved(whole, options.repeats, options.clock, before=float_pass)

    qat = QuantSim(module, x, weights="int8", activations="uint8", scheme="minmax").calibrate([x])
    steps = {
        "float step": train_step(mobilenet_v2(), x, y),
        "QAT step, regular": train_step(qat.trainable(), x, y),
        "QAT step, range learning": train_step(qat.trainable(range_learning=True), x, y),
    }
    if theirs:
        steps["AIMET QAT step"] = train_step(theirs["min_max"].model, x, y)
    found |= cost.interleaved(steps, max(options.repeats // 2, 2), options.clock)
    cost.show(found, lambda name: "float step" if "step" in name else "float pass")


def forward(x):
    def run(model, _=None):
        with torch.inference_mode():
            model(x)

    return run


def aimet(module, x, scheme):
    """AIMET's simulation of the module, calibrated."""
    from aimet_torch import quantsim
    from aimet_torch.batch_norm_fold import fold_all_batch_norms
    from aimet_torch.common.defs import QuantScheme

    copied = copy.deepcopy(module)
    fold_all_batch_norms(copied, tuple(x.shape), dummy_input=x)
    chosen = QuantScheme.min_max if scheme == "min_max" else QuantScheme.post_training_tf_enhanced
    sim = quantsim.QuantizationSimModel(copied, x, quant_scheme=chosen, default_param_bw=8, default_output_bw=8)
    sim.compute_encodings(forward(x))
    return sim


if __name__ == "__main__":
    main()
