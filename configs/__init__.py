"""The packaged configurations, one YAML per experiment; `diffalign train configs/<name>.yaml` finds them anywhere."""
