"""The sentences that answer "why is my chosen reward negative?", by case, in English and Chinese.

`[[name]]` stands for a setting of the run, with a link to it.
"""

SENTENCES: dict[str, tuple[str, str]] = {
    "why": ("Why is my chosen reward negative?", "为什么我的被选奖励是负的？"),
    "reward_is": (
        "A reward is β × (log-prob of the answer under the policy − under the reference). It is 0 before training; "
        "negative means that the policy writes this answer less readily than the reference. DPO's loss sees only the "
        "difference of two rewards, never the chosen one alone.",
        "奖励 = β ×（策略下回答的对数概率 − 参考模型下的对数概率）。训练前为 0；"
        "为负表示策略比参考模型更不倾向于写出该回答。"
        "DPO 的损失只看两个奖励之差，从不单独看被选奖励。",
    ),
    "on_held_out": ("On the held-out pairs", "在留出的样本对上"),
    "on_training": ("In the last {count} logged training steps", "在最近 {count} 个记录的训练步中"),
    "per_token": (" ({value} nats per token)", "（每词元 {value} nat）"),
    "with_accuracy": (" and the chosen answer is ahead in {value} of the pairs", "，被选回答领先的比例为 {value}"),
    "numbers_down": (
        "{pairs} a chosen answer lost {chosen} nats{per_token} and is {chosen_factor} times less likely than before; a "
        "rejected one lost {rejected} nats. {share} of the rejected answers' fall is displacement: both fell by it. "
        "The "
        "other {rest} is the preference, a margin of {margin}{accuracy}.",
        "{pairs}，被选回答下降了 {chosen} nat{per_token}，可能性降为原来的 1/{chosen_factor}；被拒回答下降了 "
        "{rejected} nat。"
        "被拒回答降幅的 {share} 属于位移：两者一同下降。其余 {rest} 才是偏好，奖励差为 {margin}{accuracy}。",
    ),
    "numbers_up": (
        "{pairs} a chosen answer gained {chosen} nats{per_token} and a rejected one {rejected} nats. {share} of the "
        "larger "
        "rise is common to both. The margin is {margin}{accuracy}.",
        "{pairs}，被选回答上升了 {chosen} nat{per_token}，被拒回答上升了 {rejected} nat。较大升幅的 {share} "
        "为两者共有。"
        "奖励差为 {margin}{accuracy}。",
    ),
    "numbers_apart": (
        "{pairs} the chosen answers' reward is {chosen_reward}, {chosen} nats per answer{per_token}, and the rejected "
        "ones' {rejected_reward}, {rejected} nats. They moved in different directions, so nothing of it is "
        "displacement. "
        "The margin is {margin}{accuracy}.",
        "{pairs}，被选回答的奖励为 {chosen_reward}，即每个回答 {chosen} nat{per_token}；被拒回答的奖励为 "
        "{rejected_reward}，"
        "即 {rejected} nat。两者方向不同，因此没有位移。奖励差为 {margin}{accuracy}。",
    ),
    "verdict_apart": (
        "It is not: the chosen answers became likelier and the rejected ones less likely.",
        "并不是负的：被选回答变得更可能，被拒回答变得更不可能。",
    ),
    "reason_apart": (
        "That is what DPO is meant to do, and the less usual outcome: most runs see both fall.",
        "这正是 DPO 的目的，而且并不常见：多数训练中两者都会下降。",
    ),
    "advice_apart": ("Nothing needs to change.", "无需更改。"),
    "verdict_both_up": (
        "It is not: both kinds of answers became likelier, the chosen ones more.",
        "并不是负的：两类回答都变得更可能，被选回答升得更多。",
    ),
    "reason_both_up": (
        "The two answers to a prompt share words and style, and what lifts one lifts the other. The policy learned to "
        "write like both, and to prefer one.",
        "同一提示的两个回答在用词和风格上相近，抬高一个也会抬高另一个。策略学会了两者的写法，并偏好其中之一。",
    ),
    "advice_both_up": (
        "Fine while the margin grows. Should rejected answers become rarer, train longer ([[num_train_epochs]]), lower "
        "[[beta]], or take sft out of [[loss_type]] if it is there.",
        "只要奖励差在增长即可。若希望被拒回答变少，可延长训练（[[num_train_epochs]]）、降低 [[beta]]，"
        "或在使用 sft 时将其移出 [[loss_type]]。",
    ),
    "verdict_slight": (
        "Because training made the chosen answers slightly less likely too, and the rejected ones much less. That is "
        "normal.",
        "因为训练使被选回答也略微变得不太可能，而被拒回答下降得更多。这是正常的。",
    ),
    "reason_slight": (
        "Pushing rejected answers down takes along what both have in common. The fall stays above the {limit} nats per "
        "token from which this tool warns.",
        "压低被拒回答时，两者共有的部分会一同下降。降幅尚未达到本工具发出警告的每词元 {limit} nat。",
    ),
    "advice_slight": (
        "Nothing needs to change. If you want the chosen answers held up all the same: add sft to [[loss_type]].",
        "无需更改。若仍希望托住被选回答，可在 [[loss_type]] 中加入 sft。",
    ),
    "verdict_deep": (
        "Because of likelihood displacement: training made the chosen answers clearly less likely, and the rejected "
        "ones "
        "even less.",
        "因为发生了似然位移：训练使被选回答明显变得不太可能，而被拒回答降得更多。",
    ),
    "reason_deep": (
        "Loss and accuracy look fine, but the probability went to answers that are in neither column. The fall is "
        "beyond "
        "the {limit} nats per token from which this tool warns (arXiv 2410.08847).",
        "损失和准确率看似正常，但概率流向了两列之外的回答。降幅已超过本工具发出警告的每词元 {limit} nat（arXiv "
        "2410.08847）。",
    ),
    "advice_deep": (
        "Read the answers below first. Then lower [[learning_rate]], raise [[beta]], or hold the chosen answers up: "
        "add sft "
        "to [[loss_type]], or set [[on_displacement]] to nll.",
        "请先阅读下面的回答。然后降低 [[learning_rate]]、提高 [[beta]]，或托住被选回答：在 [[loss_type]] 中加入 sft，"
        "或将 [[on_displacement]] 设为 nll。",
    ),
    "advice_deep_sft": (
        "Read the answers below first. Then lower [[learning_rate]], raise [[beta]], or raise the weight of sft in "
        "[[loss_weights]].",
        "请先阅读下面的回答。然后降低 [[learning_rate]]、提高 [[beta]]，或在 [[loss_weights]] 中提高 sft 的权重。",
    ),
    "verdict_unmeasured": (
        "Because training made the chosen answers less likely too, only less so than the rejected ones.",
        "因为训练使被选回答也变得不太可能，只是不如被拒回答降得多。",
    ),
    "reason_unmeasured": (
        "Pushing rejected answers down takes along what both have in common. How much that is per token this run did "
        "not "
        "log, so whether it is too much is for the answers below to tell.",
        "压低被拒回答时，两者共有的部分会一同下降。此次训练没有记录每词元的降幅，是否过多请看下面的回答。",
    ),
    "advice_unmeasured": (
        "If the answers got worse: lower [[learning_rate]], raise [[beta]], or add sft to [[loss_type]].",
        "若回答变差：降低 [[learning_rate]]、提高 [[beta]]，或在 [[loss_type]] 中加入 sft。",
    ),
    "verdict_reversed": (
        "Because the run learned the opposite of its labels: the chosen answers became less likely and the rejected "
        "ones "
        "likelier.",
        "因为训练学到了与标签相反的东西：被选回答变得不太可能，被拒回答变得更可能。",
    ),
    "reason_reversed": (
        "This is not displacement. Something is broken: the columns are swapped, the labels are wrong, or the "
        "reference is "
        "not where the policy started.",
        "这不是位移，而是出了错：两列颠倒、标签有误，或参考模型不是策略的起点。",
    ),
    "advice_reversed": (
        "Do not release this adapter. Check [[chosen_key]] and [[rejected_key]], read some pairs (`data lint "
        "--preview 5`), and "
        "check [[reference_model]].",
        "请勿发布此适配器。检查 [[chosen_key]] 与 [[rejected_key]]，阅读若干样本对（`data lint --preview 5`），并检查 "
        "[[reference_model]]。",
    ),
    "verdict_behind": (
        "The rejected answers are ahead of the chosen ones, so the preference was not learned.",
        "被拒回答领先于被选回答，偏好没有学到。",
    ),
    "reason_behind": (
        "Both moved the same way, the rejected ones to more advantage. Either the labels contradict each other, or "
        "the run "
        "is too short or its learning rate too high to have settled.",
        "两者朝同一方向移动，而被拒回答更占优。要么标签互相矛盾，要么训练太短或学习率过高而尚未稳定。",
    ),
    "advice_behind": (
        "Look for contradictions in the pairs (`data lint`), check [[chosen_key]] and [[rejected_key]], and try "
        "another "
        "[[learning_rate]].",
        "检查样本对中的矛盾（`data lint`），检查 [[chosen_key]] 与 [[rejected_key]]，并尝试另一个 [[learning_rate]]。",
    ),
    "verdict_memorized": (
        "On held-out pairs the rejected answers are ahead, although the training pairs were learned.",
        "在留出的样本对上被拒回答领先，尽管训练样本对已经学会。",
    ),
    "reason_memorized": (
        "The training margin is {training_margin}, the held-out one {margin}: what was learned does not carry over. "
        "The run "
        "memorized its pairs, or the held-out ones are of another kind.",
        "训练奖励差为 {training_margin}，留出集为 {margin}：所学未能推广。训练记住了样本，或留出样本属于另一种。",
    ),
    "advice_memorized": (
        "Train less ([[num_train_epochs]], [[learning_rate]]), use more pairs, or check that [[eval_dataset]] is like "
        "[[dataset]].",
        "减少训练（[[num_train_epochs]]、[[learning_rate]]）、使用更多样本，或检查 [[eval_dataset]] 与 [[dataset]] "
        "是否同类。",
    ),
    "verdict_still": (
        "Nothing has moved yet: both rewards are still about 0 ({chosen_reward} and {rejected_reward}).",
        "尚未有变化：两个奖励仍接近 0（{chosen_reward} 与 {rejected_reward}）。",
    ),
    "reason_still": (
        "An untrained adapter is the reference. A sign says nothing before the answers have moved.",
        "未训练的适配器就是参考模型。在回答发生变化之前，正负号没有意义。",
    ),
    "advice_still": (
        "Wait for more steps. At the end of a run this means that [[learning_rate]] was too low or that there were "
        "too few "
        "steps.",
        "请等待更多步。若训练已结束，则说明 [[learning_rate]] 过低或步数太少。",
    ),
    "verdict_unknown": (
        "Nobody can tell: the rewards are not finite numbers.",
        "无法判断：奖励不是有限数。",
    ),
    "reason_unknown": (
        "Such steps are skipped, so the adapter holds what it was before them.",
        "这些步会被跳过，适配器保持之前的状态。",
    ),
    "advice_unknown": (
        "Lower [[learning_rate]], look at the pairs that the log names, or compare with [[dtype]] float32.",
        "降低 [[learning_rate]]，检查日志中列出的样本对，或改用 [[dtype]] float32 对照。",
    ),
}
