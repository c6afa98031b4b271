"""What the page of `app` says, in English and Chinese."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Literal

Language = Literal["en", "zh"]
Words = Callable[..., str]

LABELS: dict[str, tuple[str, str]] = {
    "title": ("Before and after", "训练前后"),
    "lead_model": (
        "The same model, the same prompt, the same seed: without and with the adapter.",
        "同一模型、同一提示、同一种子：关闭与开启适配器。",
    ),
    "lead_recorded": (
        "{count} recorded prompts, each answered without and with the adapter. No model is loaded.",
        "{count} 条已记录的提示，分别在关闭与开启适配器时回答。未加载模型。",
    ),
    "tab_compare": ("Compare", "对比"),
    "tab_blind": ("Blind A/B", "盲测"),
    "tab_samples": ("Samples", "样例"),
    "tab_training": ("Training", "训练"),
    "tab_data": ("Data", "数据"),
    "tab_release": ("Release", "发布"),
    # compare
    "prompt": ("Prompt", "提示"),
    "prompt_placeholder": ("Ask something, or pick a prompt below.", "输入问题，或在下方选择提示。"),
    "pick": ("Prompts that were not trained on", "未参与训练的提示"),
    "pick_built_in": ("Built-in prompts", "内置提示"),
    "pick_recorded": ("Recorded prompts", "已记录的提示"),
    "pick_loading": ("Prompts are being read …", "正在读取提示……"),
    "compare": ("Compare", "对比"),
    "stop": ("Stop", "停止"),
    "parameters": ("Parameters", "参数"),
    "max_new_tokens": ("Longest answer (tokens)", "回答最大长度（词元）"),
    "temperature": ("Temperature (0: the likeliest token)", "温度（0：最可能的词元）"),
    "seed": ("Seed", "种子"),
    "before": ("Before", "训练前"),
    "after": ("After", "训练后"),
    "adapter_off": ("adapter off", "适配器关闭"),
    "adapter_on": ("adapter on", "适配器开启"),
    "writing": ("writing …", "生成中……"),
    "nothing_asked": ("The answer appears here.", "回答将显示在这里。"),
    "empty_answer": ("(empty)", "（空）"),
    "tokens": ("{count} tokens", "{count} 词元"),
    "cut_off": ("cut off by the limit", "因长度限制被截断"),
    "stopped": ("stopped after {seconds} s", "{seconds} 秒后停止"),
    "logp": ("log-prob {value} per token", "每词元对数概率 {value}"),
    "logp_sum": ("sum {value}", "总和 {value}"),
    "reward": ("reward {value}", "奖励 {value}"),
    "seconds": ("{value} s", "{value} 秒"),
    "heat": ("Which tokens the training made likelier", "训练使哪些词元更可能"),
    "heat_help": (
        "Color is the log-ratio of a token, policy to reference: blue became likelier, orange less likely. Point at a "
        "token to read it.",
        "颜色表示词元的对数比（策略/参考）：蓝色更可能，橙色更不可能。将指针移到词元上可读数。",
    ),
    "heat_token": (
        "log-ratio {ratio}, log-prob before {before}, after {after}",
        "对数比 {ratio}，训练前对数概率 {before}，训练后 {after}",
    ),
    "same_text": ("Both answers are the same.", "两个回答相同。"),
    "reference_answer": ("Reference answer", "参考答案"),
    # refusals
    "ask_first": ("Write a prompt first.", "请先输入提示。"),
    "too_long": (
        "The prompt has {count} characters; at most {most} are taken.",
        "提示有 {count} 个字符；最多 {most} 个。",
    ),
    "not_encodable": (
        "The prompt holds half of a character (a lone surrogate); remove it.",
        "提示中含有不完整的字符（孤立代理项），请删除。",
    ),
    "no_memory": ("The device ran out of memory: ask for a shorter answer.", "显存不足：请缩短回答长度。"),
    # blind
    "blind_help": (
        "Which answer is better? Sides are drawn by lot and named after the vote. Keys: 1 left, 2 right, 3 both good, "
        "4 both bad, s next.",
        "哪个回答更好？左右随机，投票后揭晓。快捷键：1 左，2 右，3 都好，4 都差，s 下一条。",
    ),
    "blind_ask": ("Ask blindly", "盲测此提示"),
    "blind_own": ("Ask a prompt of your own", "使用自己的提示"),
    "left": ("Left", "左"),
    "right": ("Right", "右"),
    "vote_left": ("Left is better  [1]", "左边更好  [1]"),
    "vote_right": ("Right is better  [2]", "右边更好  [2]"),
    "vote_both_good": ("Both good  [3]", "都好  [3]"),
    "vote_both_bad": ("Both bad  [4]", "都差  [4]"),
    "next": ("Next  [s]", "下一条  [s]"),
    "is_before": ("Before (adapter off)", "训练前（适配器关闭）"),
    "is_after": ("After (adapter on)", "训练后（适配器开启）"),
    "voted": ("Your vote is kept.", "投票已保存。"),
    "vote_gone": ("This round is over: take the next one.", "本轮已结束：请看下一条。"),
    "all_voted": ("You have voted on all {count} prompts.", "全部 {count} 条提示均已投票。"),
    "nothing_to_vote": (
        "There are no recorded answers yet: ask a prompt of your own, or run `python -m eval compare`.",
        "尚无已记录的回答：请输入自己的提示，或运行 `python -m eval compare`。",
    ),
    "all_same": (
        "All recorded answers are the same before and after: there is nothing to choose between.",
        "所有已记录的回答在训练前后都相同：没有可选择的。",
    ),
    "win_rate": ("Win rate of after", "训练后胜率"),
    "no_votes": ("No votes yet", "尚无投票"),
    "votes": (
        "{votes} votes: {win} for after, {tie} ties, {loss} for before",
        "{votes} 票：训练后 {win}，平局 {tie}，训练前 {loss}",
    ),
    "votes_file": ("Pairs are written to {file}", "偏好对写入 {file}"),
    # samples
    "search": ("Search", "搜索"),
    "search_placeholder": ("in prompts and answers", "在提示和回答中"),
    "category": ("Category", "类别"),
    "winner": ("Verdict", "评判"),
    "any": ("all", "全部"),
    "winner_before": ("before", "训练前"),
    "winner_after": ("after", "训练后"),
    "winner_tie": ("tie", "平局"),
    "order": ("Order", "排序"),
    "order_file": ("as recorded", "记录顺序"),
    "order_longer": ("grew most", "变长最多"),
    "order_reward": ("reward rose most", "奖励上升最多"),
    "order_fell": ("reward fell most", "奖励下降最多"),
    "previous": ("Previous", "上一页"),
    "following": ("Next", "下一页"),
    "shown": ("{first}–{last} of {count}", "第 {first}–{last} 条，共 {count} 条"),
    "none_found": ("Nothing matches.", "没有匹配的结果。"),
    "no_rows": (
        "There are no recorded answers yet. Make them with `python -m eval compare --adapter RUN`.",
        "尚无已记录的回答。运行 `python -m eval compare --adapter RUN` 生成。",
    ),
    "export_csv": ("Save as CSV", "保存为 CSV"),
    "export_jsonl": ("Save as JSONL", "保存为 JSONL"),
    # run
    "no_run": ("This adapter belongs to no run of qlora_dpo.", "此适配器不属于 qlora_dpo 的训练。"),
    "latest_steps": ("Latest steps", "最近的训练步"),
    "step": ("step", "步"),
    "live": ("Read again every {seconds} seconds while the run goes on.", "训练进行时每 {seconds} 秒重新读取。"),
    "command_compare": ("Answer the held-out prompts before and after, and judge", "在训练前后回答留出提示并评判"),
    "command_gate": ("Ship or don't: exit code 1 where a rule does not hold", "是否发布：有规则不满足时退出码为 1"),
    "command_merge": ("Merge into a plain 16-bit model folder", "合并为普通 16 位模型文件夹"),
    "command_report": ("One HTML page of this run", "此次训练的 HTML 报告"),
    "command_votes": ("Look at the pairs from votes", "检查投票得到的偏好对"),
    "no_merge": (
        "No merge has been measured yet: the command below merges, and measures what it changes.",
        "尚无合并结果：下面的命令会进行合并并测量差异。",
    ),
}  # fmt: skip


def words_in(language: Language) -> Words:
    """The function that says something in this language: `words("tokens", count=3)`."""
    place = ("en", "zh").index(language)

    def words(name: str, /, **values: object) -> str:
        found = LABELS[name][place]
        return found.format(**values) if values else found

    return words


def language_of(choice: Literal["en", "zh", "auto"]) -> Language:
    """The language to speak; auto: that of the terminal."""
    if choice != "auto":
        return choice
    names = (os.environ.get(name) for name in ("LC_ALL", "LC_MESSAGES", "LANG"))
    return "zh" if next(filter(None, names), "").startswith("zh") else "en"
