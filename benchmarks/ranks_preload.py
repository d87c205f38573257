"""Imported once by the fork server of benchmarks.ranks: everything that is slow to import, and
what libraries and the program work out once a process."""

from parallel.compat import prepare_host

prepare_host()

import deepspeed.module_inject.auto_ep_layer  # noqa: E402
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: E402, F401
import megatron.core.models.backends  # noqa: E402, F401
import torch  # noqa: E402

import pretrain.estimate  # noqa: E402
import pretrain.job  # noqa: E402
import pretrain.memory  # noqa: E402, F401
from pretrain.run_dir import installed_packages  # noqa: E402

installed_packages()
torch.compile(len)  # reads its rules; compiles nothing
