"""Rewards of completions: one file per kind, a table of their names, and the isolation of their calls."""

from hark.data.rewards.group import Failure, Group, Judged, Reward, RewardError
from hark.data.rewards.table import REWARDS, check_rewards, find_reward

__all__ = ["REWARDS", "Failure", "Group", "Judged", "Reward", "RewardError", "check_rewards", "find_reward"]
