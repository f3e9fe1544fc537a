"""The schema of the configuration is made once in a process, and stays what it is."""

from hydra.core.config_store import ConfigStore

from nemo_minitron.config.compose import as_dict, from_dict, load_config


def test_a_schema_of_a_host_program_does_not_take_the_place_of_ours():
    before = as_dict(load_config("config", []))
    ConfigStore.instance().store(name="schema", node={"mine": 1})
    assert as_dict(load_config("config", [])) == before


def test_one_configuration_does_not_change_the_next():
    before = as_dict(load_config("config", []))
    load_config("config", ["plan.hidden=3", "+launch.time_limits.score=5", "~optim.sched"])
    changed = from_dict(before)
    changed.data.train.exclude.append("more")
    changed.trainer["more"] = 1
    assert as_dict(load_config("config", [])) == before == as_dict(from_dict(before))
