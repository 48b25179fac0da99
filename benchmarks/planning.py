"""How long all shipped recipes x all model families take to lint and plan, in one process.

    python benchmarks/planning.py

Every plan is checked before its time counts: no warning, and every tensor has bytes.
"""

from __future__ import annotations

import time

from quantkit.model.families.known import MODELS
from quantkit.model.families.options import LAYOUTS, Options
from quantkit.model.open import open_model
from quantkit.planning.plan import make_plan
from quantkit.recipe.load import load
from quantkit.recipe.named import shipped


def main() -> None:
    wall, cpu = time.perf_counter(), time.process_time()
    shapes = dict(zip(reversed(MODELS.values()), reversed(MODELS), strict=True))  # a name for each config
    catalogues = [open_model(name, Options(LAYOUTS[0])) for name in shapes.values()]
    catalogues += [open_model(name, Options(LAYOUTS[1])) for name in ("deepseek-r1", "deepseek-v2")]
    recipes = [load(name) for name in shipped()]
    plans = tensors = 0
    for catalogue in catalogues:
        for recipe in recipes:
            if catalogue.arch in recipe.arch:
                plan = make_plan(catalogue, recipe)
                if plan.warnings or not all(t.nbytes > 0 for t in plan.tensors):
                    raise SystemExit(f"{recipe.name} on {catalogue.model}: {plan.warnings}")
                plans += 1
                tensors += len(plan.tensors)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"{len(recipes)} recipes x {len(catalogues)} models: {plans} plans of {tensors:,} tensors")
    print(f"{wall:.1f} s, {cpu:.1f} s of processor time, models and recipes opened included")


if __name__ == "__main__":
    main()
