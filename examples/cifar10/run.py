"""CIFAR-10 from JPEG files to a release, and the table of docs/cifar10.md.

    python examples/cifar10/run.py --images cifar10 --out /tmp/cifar10

`--images` is a folder train/CLASS/*.jpg, test/CLASS/*.jpg. Every step is the command that an owner would type; a
run that was cut off goes on. Ends with results.json and table.md in the project's folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from dpf_release.bank.dataset import BankDataset
from dpf_release.owner.init import init
from dpf_release.owner.project import Project
from dpf_release.release.train import fit_classifier, score

HERE = Path(__file__).parent
FUNCTIONS = {
    "equivalence": ["--function", "dpf"],
    "paper": ["--function", "dpf", "--objective", "paper"],
    "gaussian-noise": ["--function", "gaussian-noise"],
    "gaussian-filter": ["--function", "gaussian-filter"],
    "mean-filter": ["--function", "mean-filter"],
    "recombine-5": ["--function", "recombine:k=5"],
    "recombine-20": ["--function", "recombine:k=20"],
}
NEW_CLASSIFIER_EPOCHS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    config = options.out / "dpf.toml"
    if not config.exists():
        init(options.out)
        config.write_text((HERE / "dpf.toml").read_text().replace("IMAGES", str(options.images.resolve())))
    results_file = options.out / "results.json"
    results = json.loads(results_file.read_text()) if results_file.exists() else {"seconds": {}, "functions": {}}

    def step(*command: str) -> None:
        key = " ".join(command)
        if key in results["seconds"]:
            return
        print(f"\n$ dpf-release {key}", flush=True)
        started = time.monotonic()
        subprocess.run([sys.executable, "-m", "dpf_release", *command, "--config", str(config)], check=True)
        results["seconds"][key] = time.monotonic() - started
        results_file.write_text(json.dumps(results, indent=2))

    step("train")
    step("featurize")
    project = Project.open(config)
    vault, classes = project.vault, project.cut.record.classes
    test = BankDataset.open(vault.features, "test", classes)
    results["network"] = json.loads((vault.network / "history.json").read_text())["scores"]
    results["reconstructor"] = None
    if "clean" not in results["functions"]:
        results["functions"]["clean"] = {"new_classifier": new_classifier(project, vault.features, test)}
    for name, arguments in FUNCTIONS.items():
        step("fit-poison", "--name", name, *arguments)
        step("poison", "--name", name)
        if name not in results["functions"]:
            measured = json.loads((vault.reports(name) / "measurements.json").read_text())
            bank = vault.candidate(name) / "features"
            results["functions"][name] = measured | {"new_classifier": new_classifier(project, bank, test)}
            results_file.write_text(json.dumps(results, indent=2))
    step("package", "--name", "equivalence")
    results["reconstructor"] = json.loads((vault.reconstructors / "px2s2.json").read_text())["public_val"]
    results_file.write_text(json.dumps(results, indent=2))
    (options.out / "table.md").write_text(table(results))
    print((options.out / "table.md").read_text())


def new_classifier(project: Project, bank: Path, test: BankDataset) -> float:
    """U2: φ2's architecture, new weights, trained on a bank alone; its top-1 on clean φ1(S test)."""
    started = time.monotonic()
    network = project.new_classifier()
    fit_classifier(
        network,
        BankDataset.open(bank, "train", test.names),
        epochs=NEW_CLASSIFIER_EPOCHS,
        learning_rate=0.05,
    )
    top1 = score(network, test)
    print(f"new classifier on {bank.parent.name}: {top1:.2%} in {time.monotonic() - started:.0f} s", flush=True)
    return top1


def table(results: dict) -> str:
    """The results as Markdown; `val` from the candidate on disk."""
    lines = [
        f"Φ: top-1 {results['network']['val']:.2%} on S val, {results['network']['test']:.2%} on S test. "
        f"px2s2 on Q val: L1 {results['reconstructor']['l1']:.4f}, SSIM {results['reconstructor']['ssim']:.4f}. "
        f"All steps: {sum(results['seconds'].values()) / 60:.1f} minutes without the new classifiers.",
        "",
        "| function | top-1 drop, points [95 %] | mean SSIM | mean \\|SSIM\\| | L1 | φ3 top-1 on S test |",
        "|---|---|---|---|---|---|",
    ]
    functions = results["functions"]
    clean = functions["equivalence"]["val"]["reconstruction"]["px2s2"]
    lines.append(
        f"| none | | {clean['ssim_clean']:.4f} | {clean['abs_ssim_clean']:.4f} | {clean['l1_clean']:.4f} "
        f"| {functions['clean']['new_classifier']:.2%} |"
    )
    for name in FUNCTIONS:
        task, psi = functions[name]["val"]["task"], functions[name]["val"]["reconstruction"]["px2s2"]
        low, high = task["top1_difference_95"]
        lines.append(
            f"| {name} | {100 * task['top1_difference']:.2f} [{100 * low:.2f}, {100 * high:.2f}] "
            f"| {psi['ssim_poisoned']:.4f} | {psi['abs_ssim_poisoned']:.4f} | {psi['l1_poisoned']:.4f} "
            f"| {functions[name]['new_classifier']:.2%} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
