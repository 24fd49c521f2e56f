"""Placeholder until the probe is merged."""


def load_remote_backbone(name, trust_remote_code, **kwargs):
    raise NotImplementedError
