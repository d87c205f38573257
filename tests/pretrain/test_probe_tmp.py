import time
from tests.ranks import run_ranks
from tests.tiny import tiny_config


def go(config):
    t = time.time()
    from pretrain.trainer import train
    from parallel.launch import launch_from_environment

    train(config, launch_from_environment())
    return time.time() - t


def test_x(tiny_data, tmp_path):
    for n in range(3):
        t = time.time()
        print(
            run_ranks(
                1,
                go,
                tiny_config(
                    tiny_data, tmp_path / str(n), training={"steps": 6}, checkpoint={"every": 2}
                ),
            ),
            time.time() - t,
        )
    t = time.time()
    print(
        run_ranks(
            2,
            go,
            tiny_config(
                tiny_data, tmp_path / "two", training={"steps": 6}, checkpoint={"every": 2}
            ),
        ),
        time.time() - t,
    )
