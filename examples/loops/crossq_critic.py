"""A critic as in CrossQ (Bhatt et al. 2024, arXiv 1902.05605): without target networks, so its normalization matters.

Run: python examples/loops/crossq_critic.py
"""

import tempfile

import gymnasium
import torch
from torch import nn

from syncbn.study import Study


def run(setting):
    layers = [nn.Linear(4, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU()]
    critic = setting.normalize(nn.Sequential(*layers, nn.Linear(64, 1)))
    actor = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 1), nn.Tanh())
    lr, steps = setting.config.optimizer.lr, setting.options.get("steps", 1500)
    of_critic, of_actor = (torch.optim.Adam(model.parameters(), lr, (0.5, 0.999)) for model in (critic, actor))
    pendulums = gymnasium.make_vec("Pendulum-v1", num_envs=16)
    memory = torch.empty(steps, 16, 8)  # states, actions, rewards and next states
    for step in range(steps):
        if step % 200 == 0:  # the end of an episode
            now = torch.from_numpy(pendulums.reset(seed=None if step else 16 * setting.seed)[0])
        actions = (actor(now).detach() + 0.3 * torch.randn(16, 1)).clamp(-1, 1)
        later, rewards = map(torch.from_numpy, pendulums.step(2 * actions.numpy())[:2])
        memory[step] = torch.cat((now, actions, rewards[:, None].float(), later), 1)
        now = later
        # Present and next pairs pass the critic together and share statistics: `batch_size` is the number of both.
        drawn = memory[: step + 1].flatten(0, 1)[torch.randint(16 * (step + 1), (setting.batch_size // 2,))]
        old, action, reward, new = drawn.split((3, 1, 1, 3), 1)
        pairs = torch.cat((torch.cat((old, action), 1), torch.cat((new, actor(new).detach()), 1)))
        value, next_value = critic.train()(pairs).chunk(2)
        of_critic.zero_grad()
        nn.functional.mse_loss(value, 0.1 * reward + 0.97 * next_value.detach()).backward()
        of_critic.step()
        if step % 3 == 0:
            of_actor.zero_grad()
            (-critic.eval()(torch.cat((old, actor(old)), 1)).mean()).backward()
            of_actor.step()
        if step % 200 == 199:
            setting.report(step, reward=memory[step - 199 : step + 1, :, 4].mean())
    return {"reward": memory[-200:, :, 4].mean()}


if __name__ == "__main__":
    renorm = {"name": "renorm", "warmup_steps": 100, "r_ramp_end": 400, "d_ramp_end": 400}
    arms = {"batch": {"reference": True}, "renorm": {"overrides": {"norm": renorm}}}
    metric = {"name": "reward", "higher_is_better": True, "percent": False}
    base = {"per_gpu_batch_size": 128, "device": "cpu", "optimizer": {"lr": 0.001}}
    study = Study(run=run, metric=metric, base=base, arms=arms, seeds=range(3))
    study.run(tempfile.mkdtemp(), progress=False)
    print(study.compare().T)
