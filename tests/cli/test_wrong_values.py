"""Wrong values of options: each is one line that names the option or the value, before anything long starts."""

import shlex

import pytest

from tests import small
from tests.small import Cli

pytestmark = pytest.mark.slow

FIT, LIVE, EXPERTS, EVALUATE = "fit", "fit on live networks", "experts", "evaluate"

WRONG = {
    FIT: """
        --model.ipc x
        --model.ipc 1.5
        --model.ipc nan
        --model.ipc -1
        --model.ipc 99999
        --model.factor -1
        --model.factor 9
        --model.formation both
        --model.image_space rgb
        --model.init random
        --model.labels firm
        --model.image_lr nan
        --model.image_lr inf
        --model.image_lr x
        --model.image_lr -1
        --model.student_lr 0
        --model.student_lr nan
        --model.student_lr_lr -1
        --model.student_lr_lr x
        --model.label_lr -2
        --model.momentum 1.5
        --model.momentum -0.1
        --model.momentum x
        --model.label_momentum 1
        --model.image_steps sometimes
        --model.image_optimizer rmsprop
        --model.equal_norm maybe
        --model.inner_loop 0
        --model.inner_loop x
        --model.clamp true
        --model.student_lr_floor 0
        --model.student_lr_floor -1
        --model.on_nonfinite ignore
        --model.execution.compile maybe
        --model.execution.precision float16
        --model.execution.micro_batch 0
        --model.execution.micro_batch x
        --model.execution.memory_gb 0
        --model.seed x
        --model.network W999999
        --model.network nothing:here
        --model.network ''
        --model.network torchvision/resnet999
        --model.network timm/nothing
        --model.network 3
        --model.objective.syn_steps 0
        --model.objective.syn_steps x
        --model.objective.batch_syn 0
        --model.objective.augmentation purple
        --model.objective Nothing
        --model.objective.nothing 3
        --model.pool Nothing
        --model.pool.path ''
        --model.pool.num_experts 0
        --model.pool.num_experts x
        --model.pool.expert_epochs 0
        --model.pool.max_start_epoch 0
        --model.pool.min_start_epoch -1
        --model.pool.current_max_start_epoch 1
        --model.pool.expansion_steps 0
        --model.pool.train_epochs 1
        --model.pool.refresh sometimes
        --model.pool.share_start_epoch 3
        --model.pool.skip_damaged maybe
        --model.pool.recipe.lr 0
        --model.pool.recipe.lr nan
        --model.pool.recipe.batch_size 0
        --model.pool.recipe.momentum 1
        --model.pool.recipe.weight_decay -1
        --model.pool.recipe.augmentation purple
        --model.pool.recipe.nothing 1
        --model.nothing 1
        --modle.ipc 1
        --selection.num_candidates 0
        --selection.num_candidates x
        --selection.num_candidates 99
        --selection.temperature 0
        --selection.temperature -1
        --selection.temperature nan
        --selection.temperature x
        --selection.favor best
        --selection.normalize softmax
        --selection.pool_size 1
        --selection.pool_size x
        --selection.every_n_steps 0
        --selection.refresh_per_step 0
        --selection.refresh_per_step 99
        --selection.score_steps 0
        --selection.score_steps 99
        --selection.nothing 1
        --selection Nothing
        --evaluation.every_n_steps 0
        --evaluation.every_n_steps x
        --evaluation.num_networks 0
        --evaluation.num_networks_intermediate 0
        --evaluation.num_networks_intermediate 99
        --evaluation.recipe best
        --evaluation.epochs 0
        --evaluation.epochs -1
        --evaluation.epochs x
        --evaluation.augmentation purple
        --evaluation.split train
        --evaluation.split val
        --evaluation.networks [ConvNet-1-W4,ConvNet-1-W4]
        --evaluation.networks 3
        --evaluation.compare_random maybe
        --evaluation.nothing 1
        --writer.every_n_steps 0
        --writer.max_per_class 0
        --writer.nothing 1
        --checkpoint.every_n_train_steps 0
        --checkpoint.every_n_train_steps -1
        --checkpoint.save_top_k 0
        --checkpoint.save_top_k -2
        --checkpoint.save_weights_only true
        --checkpoint.mode middle
        --trainer.max_steps 0
        --trainer.max_steps -2
        --trainer.max_steps x
        --trainer.max_epochs 0
        --trainer.limit_train_batches 0
        --trainer.limit_train_batches 2.5
        --trainer.accelerator foo
        --model.network ConvNet-3-W999999
        --model.network os.system
        --model.network os.path:join
        --trainer.precision 13
        --trainer.accumulate_grad_batches 2
        --trainer.strategy foo
        --trainer.max_time x
        --trainer.num_nodes 0
        --trainer.nothing 1
        --trainer.logger Nothing
        --trainer.callbacks Nothing
        --trainer.detect_anomaly maybe
        --data Nothing
        --data.val_fraction 1
        --data.val_fraction -0.1
        --data.val_fraction nan
        --data.split_seed x
        --data.color_space purple
        --data.nothing 1
        --seed_everything -5
        --seed_everything x
        --seed_everything 4294967296
        --name ''
        --name ../../x
        --runs ''
        --ckpt_path nothing.ckpt
        --ckpt_path last
        --ckpt_path ''
        --config nothing.yaml
        --config ''
        --weights_only maybe
        positional
        --model.seed -1
        --evaluation.networks []
        --model.objective.loss_threshold -1
        --model.seed 99999999999999999999
        --trainer.overfit_batches 2
        --model.label_lr 0.1
        --checkpoint.monitor nothing
        --trainer.log_every_n_steps -1
        --trainer.gradient_clip_val -1
        --trainer.min_steps 99999
        --trainer.max_time 00:00:00:00
        --trainer.barebones true
        --trainer.enable_checkpointing false
        --trainer.fast_dev_run -1
        --trainer.devices foo
        --trainer.profiler foo
        --trainer.limit_val_batches -1
    """,
    LIVE: """
        --model.objective.batch_real 0
        --model.objective.batch_real x
        --model.objective.batch_real -3
        --model.objective.batch_syn 0
        --model.objective.metric l3
        --model.objective.sampling best
        --model.pool.num_networks 0
        --model.pool.age_limit 0
        --model.pool.refresh sometimes
        --model.pool.pretrain_epochs -1
        --model.pool.recipe.lr -1
        --model.pool.recipe.images_per_update 0
        --model.pool.recipe.batch_size x
        --model.pool.recipe.steps_per_update 0
        --model.objective.cutmix_p 2
        --model.objective.interval 0
        --model.objective.per_cluster 0
    """,
    EXPERTS: """
        --num_experts 0
        --num_experts x
        --epochs 0
        --epochs -1
        --epochs nan
        --path ''
        --network Nothing
        --recipe.lr 0
        --recipe.lr nan
        --recipe.batch_size 0
        --recipe.momentum -1
        --recipe.precision float8
        --recipe.nothing 1
        --execution.compile maybe
        --execution.micro_batch 0
        --device tpu
        --device cuda:99
        --nothing 1
        --data Nothing
        --config nothing.yaml
    """,
    EVALUATE: """
        nothing.safetensors
    """,
}
ROWS = [(command, line.strip()) for command, lines in WRONG.items() for line in lines.strip().splitlines()]


def test_there_are_many() -> None:
    assert len(set(ROWS)) == len(ROWS) >= 210


@pytest.mark.parametrize(("command", "options"), ROWS)
def test_one_line(cli: Cli, command: str, options: str) -> None:
    given = {
        FIT: ["fit", *small.command_line(cli.folder, cli.folder / "store"), "--model.pool.train_missing", "false"],
        LIVE: ["fit", *small.network_command_line(cli.folder), "--trainer.max_steps", "1", "--evaluation", "null"],
        EXPERTS: ["experts", "--data", "DigitsDataModule", "--path", "store", "--network", "ConvNet-1-W4"],
        EVALUATE: ["evaluate"],
    }[command]
    words = shlex.split(options)
    with pytest.raises(SystemExit) as ended:
        cli(*given, *words)
    assert ended.value.code in {1, 2}
    lines = [line for line in cli.err.splitlines() if line.startswith("dd-lightning: error: ")]
    assert len(lines) == 1
    assert "Traceback" not in cli.err
    names = [word[2:].split(".")[-1] for word in words if word.startswith("--")]
    values = [word for word in words if word and not word.startswith("--")]
    assert any(each in lines[0] for each in (*names, *values))
    assert not (cli.folder / "store").exists()
