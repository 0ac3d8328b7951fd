"""wandb, without a server."""

import types


class FakeWandb(types.ModuleType):
    """Notes what it is told."""

    def __init__(self):
        super().__init__("wandb")
        self.started, self.logged, self.finished = [], [], []

    def init(self, **arguments):
        self.started.append(arguments)
        return types.SimpleNamespace(log=lambda values, step: self.logged.append((step, values)), finish=self.finish)

    def finish(self, exit_code):
        self.finished.append(exit_code)
