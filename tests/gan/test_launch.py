import pytest

from spectralnorm.errors import UserError
from spectralnorm.gan.launch import Launch, first_node, launch_of

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
SLURM = {
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
}


def test_a_process_that_was_started_alone_has_no_others():
    assert launch_of({}) is None
    assert launch_of({**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}) is None


def test_a_batch_script_of_slurm_is_alone_although_its_job_has_tasks():
    assert launch_of({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "1"}) is None


def test_torchrun_says_where_the_others_are():
    assert launch_of(TORCHRUN) == Launch(rank=3, size=4, local_rank=1, address="10.0.0.1", port=29500)


def test_a_step_of_slurm_says_where_the_others_are():
    launch = launch_of(SLURM)
    assert launch is not None
    assert (launch.rank, launch.size, launch.local_rank, launch.address) == (3, 4, 1, "gpu07")
    assert 15000 <= launch.port < 30000
    other = launch_of({**SLURM, "SLURM_STEP_ID": "1"})
    assert other is not None
    assert other.port != launch.port
    assert launch_of({**SLURM, "MASTER_ADDR": "head", "MASTER_PORT": "4000"}) == Launch(
        rank=3, size=4, local_rank=1, address="head", port=4000
    )


@pytest.mark.parametrize(
    ("nodes", "first"), [("n1", "n1"), ("n[1-3]", "n1"), ("a[01,05]b,c", "a01b"), ("x,y[1-2]", "x")]
)
def test_the_first_node_of_a_list(nodes: str, first: str):
    assert first_node(nodes) == first


@pytest.mark.parametrize("name", ["LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_an_incomplete_environment_is_told(name: str):
    with pytest.raises(UserError, match=f"has no {name}"):
        launch_of({key: value for key, value in TORCHRUN.items() if key != name})


def test_a_rank_that_is_no_number_is_told():
    with pytest.raises(UserError, match="RANK must be a whole number, got 'three'"):
        launch_of({**TORCHRUN, "RANK": "three"})
