"""Train a language model to reason: read a recipe, run its stages in order.

    torchrun train.py                                 the default recipe: pretrain a tiny MoE, then GRPO
    torchrun train.py configs/countdown_cpu.toml      another recipe
    torchrun train.py --rl.steps=10 --seed 1          any key of reason_rl/config
    torchrun --nproc-per-node 2 train.py              several processes, sharded with FSDP2

The algorithm is reason_rl/stages/grpo.py; the loop that logs, saves and resumes is reason_rl/run/loop.py.
"""

import sys

from reason_rl.config import Config, ConfigError, parse_command_line
from reason_rl.config.help import help_text
from reason_rl.parallel.world import close_world, end_process, init_world
from reason_rl.report.page import write_report
from reason_rl.report.terminal import make_view
from reason_rl.run.begin import begin_run
from reason_rl.run.folder import StopSignal, as_begun, how_to_talk, open_run
from reason_rl.run.recipe import plan_recipe
from reason_rl.run.stage_folder import Interrupted


def main(config: Config) -> int:
    world = init_world(config.run)
    try:
        folder = open_run(config, world)  # a new run, one to resume, or a finished one
        if folder.is_finished:
            if world.is_main:
                print(f"{folder.path} is finished: see {write_report(folder.path)}. --resume never repeats it in a new folder.")
            return 0

        # Check everything, then run the stages in order.
        world = as_begun(world, folder)
        recipe = plan_recipe(config)
        with make_view(f"reason_rl · {config.run.name}", world.rank) as view:
            try:
                with begin_run(config, recipe, world, folder, view, StopSignal(view.message)) as run:
                    for stage in recipe:
                        run.complete(stage)  # reuses a finished output, or trains from the newest checkpoint
                    run.finish()
            except Interrupted as stopped:
                again = "The same command" if config.run.resume == "auto" else f"train.py {folder.path}/config.toml"
                view.message(f"Saved: {stopped}. {again} continues from here.")
                return 130

        if world.is_main:
            print(f"Done. The report: {folder.path}/report.html · talk to the model: {how_to_talk(folder.path, recipe[-1].config)}")
        return 0
    finally:
        close_world(world)


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(help_text())
        sys.exit(0)
    try:
        end_process(main(parse_command_line(sys.argv[1:])))
    except ConfigError as error:
        sys.exit(f"train.py: {error}")
