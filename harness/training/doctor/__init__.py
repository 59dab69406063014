"""What `harness doctor` looks at before a run: `machine` without a config, `one_config` with one."""
