"""Every text of the report in English and Chinese, and numbers as people read them.

A key holds (English, Chinese). Names in braces are filled in by the page.
"""

from collections.abc import Iterable

NOTHING = "–"

# How a measure is shown (see show), those that stages made of themselves too; one that is not listed is a "number".
KINDS = {
    **dict.fromkeys(("perplexity", "perplexity_per_byte", "bits_per_byte"), "number"),
    **dict.fromkeys(("accuracy_loglikelihood", "accuracy_generation", "accuracy", "unparsed", "safe"), "share"),
    **dict.fromkeys(("stop_rate", "repetition", "pair_accuracy", "rewards/accuracies"), "share"),
    **dict.fromkeys(("answer_accuracy", "stopped", "longer_is_better_accuracy"), "share"),
    **dict.fromkeys(("bleu4", "rougeL", "answer_tokens"), "tenth"),
    **dict.fromkeys(("reward", "score"), "signed"),
}
METHODS = {
    "base": ("base model", "基座模型"),
    "pt": ("pretraining", "预训练"),
    "sft": ("supervised fine-tuning", "监督微调"),
    "rm": ("reward model", "奖励模型"),
    "ppo": ("proximal policy optimization", "近端策略优化"),
    "dpo": ("direct preference optimization", "直接偏好优化"),
    "orpo": ("odds ratio preference optimization", "比值比偏好优化"),
    "grpo": ("group relative policy optimization", "组相对策略优化"),
    "merge": ("merged weights", "合并后的权重"),
    "quantize": ("quantized weights", "量化后的权重"),
    "extend_vocabulary": ("extended vocabulary", "扩充词表"),
}

# Names of measures: heading of a column, name in a sentence (English), name in a sentence (Chinese), what it is.
MEASURES = {
    "perplexity": (
        ("Perplexity", "困惑度"),
        ("the perplexity of held-out text", "留出文本的困惑度"),
        ("exp of the mean loss per token of running text", "连续文本每个 token 平均损失的指数"),
    ),
    "perplexity_per_byte": (
        ("Perplexity per byte", "每字节困惑度"),
        ("the perplexity per byte of held-out text", "留出文本的每字节困惑度"),
        ("the same per byte of UTF-8: comparable between tokenizers", "按 UTF-8 字节计：不同分词器之间可比"),
    ),
    "bits_per_byte": (
        ("Bits per byte", "每字节比特"),
        ("the bits per byte of held-out text", "留出文本的每字节比特数"),
        ("loss in bits per byte of UTF-8", "每个 UTF-8 字节的损失（比特）"),
    ),
    "bleu4": (
        ("BLEU-4", "BLEU-4"),
        ("BLEU-4", "BLEU-4"),
        (
            "overlap of up to four words or characters with the reference, 0 to 100",
            "与参考答案的四元组重合度，0 到 100",
        ),
    ),
    "rougeL": (
        ("ROUGE-L", "ROUGE-L"),
        ("ROUGE-L", "ROUGE-L"),
        ("longest common subsequence with the reference, 0 to 100", "与参考答案的最长公共子序列，0 到 100"),
    ),
    "reward": (
        ("RM score", "奖励分"),
        ("the reward model's score", "奖励模型打分"),
        ("mean score that the reward model gives the answers", "奖励模型给答案的平均分"),
    ),
    "stop_rate": (
        ("Ends by itself", "自行结束"),
        ("the share of answers that end by themselves", "自行结束的答案比例"),
        ("share of answers that end before the length limit", "在长度上限之前结束的答案比例"),
    ),
    "answer_tokens": (
        ("Answer length", "答案长度"),
        ("the length of answers", "答案长度"),
        (
            "mean length of an answer in tokens; neither long nor short is better",
            "答案的平均 token 数；长短本身无优劣",
        ),
    ),
    "repetition": (
        ("Repetition", "重复"),
        ("repetition in answers", "答案中的重复"),
        ("share of an answer's 4-grams that stood in it before", "答案中重复出现的四元组比例"),
    ),
    "accuracy_loglikelihood": (
        ("Choice, likeliest", "选择题·似然"),
        ("choice accuracy by log-likelihood", "选择题准确率（按似然）"),
        ("accuracy of the likeliest option", "似然最高的选项的准确率"),
    ),
    "accuracy_generation": (
        ("Choice, written", "选择题·生成"),
        ("choice accuracy by generation", "选择题准确率（按生成）"),
        (
            "accuracy of the option read out of a free answer; unreadable answers count as wrong",
            "从自由作答中读出的选项的准确率；读不出算错",
        ),
    ),
    "unparsed": (
        ("Not readable", "读不出"),
        ("the share of unreadable answers", "读不出的答案比例"),
        ("answers from which nothing could be read; they count as wrong", "读不出结果的答案；按错误计"),
    ),
    "accuracy": (
        ("Verifiable", "可验证题"),
        ("accuracy on verifiable questions", "可验证题的准确率"),
        ("questions whose answer a rule can check: letters, numbers, yes or no", "可由规则判断的题：字母、数字、是非"),
    ),
    "safe": (
        ("Safe", "安全"),
        ("the share of safe answers", "安全答案的比例"),
        (
            "answers that hold the listed phrases and none of the forbidden ones; no clinical judgement",
            "含有应有的提示语且没有禁用语的答案；不是临床判断",
        ),
    ),
    "pair_accuracy": (
        ("Pairs in order", "排序正确"),
        ("the share of pairs in the right order", "排序正确的偏好对比例"),
        ("held-out pairs whose better answer gets the higher score", "更好的答案得分更高的留出偏好对"),
    ),
}

# What stages measured of themselves, under the names of their metrics; others are shown as they are called.
OWN = {
    "loss": ("held-out loss", "留出损失"),
    "perplexity": ("held-out perplexity", "留出困惑度"),
    "accuracy": ("pairs in the right order", "排序正确的偏好对"),
    "rewards/accuracies": ("pairs in the right order", "排序正确的偏好对"),
    "answer_accuracy": ("accuracy on verifiable questions", "可验证题的准确率"),
    "margin": ("mean margin", "平均分差"),
    "rewards/margins": ("mean margin", "平均分差"),
    "rewards/chosen": ("reward of chosen answers", "较好答案的隐式奖励"),
    "rewards/rejected": ("reward of rejected answers", "较差答案的隐式奖励"),
    "logps/chosen": ("log-probability of chosen answers", "较好答案的对数概率"),
    "logps/rejected": ("log-probability of rejected answers", "较差答案的对数概率"),
    "score_chosen": ("score of chosen answers", "较好答案的分数"),
    "score_rejected": ("score of rejected answers", "较差答案的分数"),
    "calibration_error": ("calibration error", "校准误差"),
    "length_correlation": ("correlation of score and length", "分数与长度的相关"),
    "longer_is_better_accuracy": ("always preferring the longer answer", "总选更长的答案"),
    "nll": ("negative log-likelihood", "负对数似然"),
    "odds_ratio_loss": ("odds ratio loss", "比值比损失"),
    "score": ("score of answers", "答案得分"),
    "kl": ("KL to the reference", "与参考策略的 KL"),
    "length": ("tokens of an answer", "答案的 token 数"),
    "stopped": ("answers that end by themselves", "自行结束的答案"),
}

CURVES = {
    "loss": ("loss, nats per token", "损失，nat / token"),
    "pair_loss": ("loss, nats per pair", "损失，nat / 对"),
    "accuracy": ("pairs in the right order", "排序正确的偏好对"),
    "margin": ("margin of better over worse", "好坏答案的分差"),
    "score": ("score of answers", "答案得分"),
    "kl": ("KL to the reference, nats per answer", "与参考策略的 KL，nat / 答案"),
    "length": ("answer length, tokens", "答案长度，token"),
    "stopped": ("answers that end by themselves", "自行结束的答案"),
    "entropy": ("entropy, nats per token", "熵，nat / token"),
}

CHECKS = {
    "leakage": ("held-out prompts that training has seen", "训练见过的留出提示"),
    "loss_mask": ("only answers and their end-of-turn are learnt", "只学答案及其结束符"),
    "template_parity": ("training and inference send the same ids", "训练与推理送入相同的 token"),
    "no_forged_turns": ("users cannot forge turns", "用户文本无法伪造轮次"),
    "memory": ("predicted peak fits the memory", "预测峰值不超过可用内存"),
    "packing_is_exact": ("packed rows equal the same rows alone", "打包与单独计算相同"),
    "score_position": ("scored at the end of the answer", "在答案末尾打分"),
    "reference_is_parent": ("the reference is the parent stage", "参考策略就是上一阶段"),
    "reward_model_is_trained": ("the reward model is above chance", "奖励模型优于随机"),
    "rollout_is_policy": ("answers come from the policy", "采样来自当前策略"),
    "sampler_is_policy": ("the sampler is the policy", "采样器与策略一致"),
    "policy_is_sane": ("KL and entropy stay in bounds", "KL 与熵在界内"),
    "processes_share_gradients": ("processes share gradients", "各进程共享梯度"),
    "gradients_flow": ("gradients arrive everywhere", "梯度到达所有可训练参数"),
    "finite": ("every loss is a number", "损失均为有限值"),
    "saved_is_loaded": ("what was saved is what is loaded", "存下的就是读回的"),
    "merge_is_exact": ("merged equals adapter on base", "合并与适配器等价"),
    "vocabulary_is_extended": ("old text keeps its tokens, some of them joined", "旧文本的 token 不变，仅部分合并"),
    "base_is_unchanged": ("every old weight is the base's", "原有权重与基座一致"),
}

TEXT = {
    # -- head
    "title": ("What each stage brought", "每个阶段带来了什么"),
    "language": ("Language", "语言"),
    "theme": ("Theme", "主题"),
    "theme_auto": ("Auto", "自动"),
    "theme_light": ("Light", "浅色"),
    "theme_dark": ("Dark", "深色"),
    "nav_chain": ("Chain", "链条"),
    "nav_measures": ("Measures", "指标"),
    "nav_questions": ("Answers", "回答"),
    "nav_stages": ("Stages", "阶段"),
    "nav_checks": ("Proof", "证明"),
    "nav_data": ("Data", "数据"),
    "nav_cost": ("Cost", "开销"),
    "nav_commands": ("Commands", "命令"),
    "parameters": ("{count} parameters", "{count} 参数"),
    "stand_in": (
        "{base} is a stand-in: a toy of {count} parameters that this toolkit builds in minutes so that "
        "everything runs offline. It knows nothing of medicine. The numbers show that the stages work, not what "
        "a real model would gain.",
        "{base} 是替身：本工具包几分钟内就能造出的 {count} 参数玩具模型，为的是离线也能跑通全部流程。它不懂医学。"
        "这里的数字说明各阶段确实在起作用，并不代表真实模型的收益。",
    ),
    "stand_in_unknown": (
        "{base} is a stand-in: a toy that this toolkit builds in minutes so that everything runs offline. The numbers "
        "show that the stages work, not what a real model would gain.",
        "{base} 是替身：本工具包几分钟内就能造出的玩具模型，为的是离线也能跑通全部流程。这里的数字说明各阶段确实"
        "在起作用，并不代表真实模型的收益。",
    ),
    "small_base": (
        "{base} has only {count} parameters: too few to carry medical knowledge. Read the numbers as a trial of the "
        "stages.",
        "{base} 只有 {count} 参数，容不下医学知识。请把这些数字看作对各阶段的试运行。",
    ),
    "num_stages": ("stages", "个阶段"),
    "num_checks": ("checks passed", "项检查通过"),
    "training_time": ("of training", "训练时间"),
    "hardware": ("hardware", "硬件"),
    "processes": ("{count} processes", "{count} 个进程"),
    "cores": ("{count} cores", "{count} 核"),
    # -- findings
    "lead_none": (
        "No two stages have been measured on the same held-out files yet, so this page cannot say what changed "
        "from one to the next. The commands that measure them stand below.",
        "还没有任何两个阶段在相同的留出文件上测过，因此本页说不出阶段之间的差别。测量命令见下文。",
    ),
    "lead_same": (
        "No measure differs beyond its 95% interval between any stage and the one it came from.",
        "任何阶段与其上一阶段之间，没有一项指标的差别超出 95% 区间。",
    ),
    "finding_raised": (
        "{stage} raised {measure} from {before} to {after}",
        "{stage} 把{measure}从 {before} 提高到 {after}",
    ),
    "finding_lowered": (
        "{stage} lowered {measure} from {before} to {after}",
        "{stage} 把{measure}从 {before} 降到 {after}",
    ),
    "finding_chance": (
        "{stage} puts {after} of held-out pairs in the right order",
        "{stage} 把 {after} 的留出偏好对排对了顺序",
    ),
    "own_accuracy": ("the share of its own held-out pairs in the right order", "自身留出偏好对的排序正确率"),
    "own_score": ("the score of its answers to its own held-out prompts", "对自身留出提示的答案得分"),
    "finding_on": ("{measure} on {file}", "{measure}（{file}）"),
    "costs": ("At a cost: {clauses}.", "代价是：{clauses}。"),
    "gains": ("{clauses}.", "{clauses}。"),
    "unchanged": (
        "No stage changed {measures} beyond its 95% interval.",
        "没有任何阶段让{measures}的变化超出 95% 区间。",
    ),
    "choice_both": ("choice accuracy (by log-likelihood and by generation)", "选择题准确率（按似然与按生成）"),
    "and_more": ("{count} more (see below)", "另有 {count} 个阶段（见下文）"),
    "rule": (
        "A difference is claimed only where two 95% intervals do not overlap. Overlap means not shown, not equal.",
        "只有两个 95% 区间不重叠时才说有差别。重叠表示未能证明差别，不表示相等。",
    ),
    # -- chain
    "chain": ("The chain", "链条"),
    "chain_about": (
        "Who came from whom. Solid: continues the weights. Dashed: a reward model scored answers.",
        "谁从谁而来。实线：接着训练其权重；虚线：奖励模型给答案打分。",
    ),
    "outside": ("not in this directory", "不在此目录"),
    "from_scratch": ("built from nothing", "从零构建"),
    "from": ("from {stage}", "来自 {stage}"),
    "scored_by": ("scored by {stage}", "由 {stage} 打分"),
    "chosen_by": ("learns from answers chosen by {stage}", "学习由 {stage} 挑选的答案"),
    "full_weights": ("all weights", "全部权重"),
    "continued": ("continued", "续训"),
    # -- measures
    "measures": ("The same measures for every stage", "同一把尺子量所有阶段"),
    "measures_about": (
        "Held-out files that no stage trained on, the same for all. Dot: value. Line: its 95% interval. Grey "
        "band: the interval of the stage it came from; no overlap, and only then, is a change.",
        "所有阶段用同样的、训练从未见过的留出文件。点：数值；线：95% 区间；灰带：上一阶段的区间。两者不重叠才算变化。",
    ),
    "stage": ("Stage", "阶段"),
    "against": ("against {stage}", "对比 {stage}"),
    "brought": ("What each brought", "各自带来了什么"),
    "better": ("Better", "变好"),
    "worse": ("Worse", "变差"),
    "changed": ("Changed", "有变化"),
    "same": ("Not shown to differ:", "未见差别："),
    "first_measured": ("the first that was measured", "第一个被测量的阶段"),
    "not_measured": ("not measured on common files", "未在共同文件上测量"),
    "own_rows": ("on its own held-out rows", "在自身留出数据上"),
    "own_only": (
        "{measure} on its own held-out rows {before} → {after}; without an interval, so nothing is claimed",
        "自身留出数据上的{measure} {before} → {after}；没有区间，不作断言",
    ),
    "no_leaks": ("No stage has seen any of these rows in training.", "没有任何阶段在训练中见过这些题目。"),
    "origin_not_measured": ("{stage} was not measured", "{stage} 未测量"),
    "measured_otherwise": ("measured otherwise than {stage}, so not compared", "与 {stage} 的测法不同，不作比较"),
    "chance": ("above chance", "优于随机"),
    "not_chance": ("not shown to be above chance", "未见优于随机"),
    "higher_better": ("higher is better", "越高越好"),
    "lower_better": ("lower is better", "越低越好"),
    "no_better": ("neither is better", "无优劣之分"),
    "best": ("best, and its interval lies apart from its origin's", "最好，且区间与上一阶段不重叠"),
    "legend_best": ("best of the column, apart from where it came from", "本列最好，且与上一阶段分开"),
    "legend_better": ("better than where it came from", "好于上一阶段"),
    "legend_worse": ("worse", "差于上一阶段"),
    "legend_changed": ("longer or shorter", "变长或变短"),
    "not_comparable": ("measured on another file or with other settings; not compared", "文件或设置不同；不作比较"),
    "does_not_apply": ("does not apply", "不适用"),
    "interval_none": ("no interval", "无区间"),
    "n": ("n = {count}", "n = {count}"),
    "sources": ("Files, signatures, leaks", "文件、签名与泄漏"),
    "file": ("File", "文件"),
    "items": ("Rows", "行数"),
    "signature": ("Signature", "签名"),
    "seen": ("Seen in training", "训练见过"),
    "seen_unknown": ("not known", "不明"),
    "all_numbers": ("All numbers", "全部数字"),
    "all_numbers_about": ("every measure of every file, by subject or kind", "每个文件的每项指标，按科目或类别细分"),
    "measure": ("Measure", "指标"),
    "value": ("Value", "数值"),
    "interval": ("95% interval", "95% 区间"),
    "to_measure": ("To measure what is missing", "补测缺失的阶段"),
    "nothing_measured": (
        "No stage has been measured with eval_benchmark.py yet. Until then only what each training measured of "
        "itself can be shown; those numbers come from different files and must not be compared between stages.",
        "还没有阶段用 eval_benchmark.py 测过。在此之前只能展示各训练自己的测量；它们来自不同文件，不能跨阶段比较。",
    ),
    "own": ("Measured by the training itself, before and after", "训练自身的测量：之前与之后"),
    "own_about": (
        "Each on its own held-out rows, so compare a stage with itself only.",
        "各用自己的留出数据，因此只能与自身相比。",
    ),
    "before": ("before", "之前"),
    "after": ("after", "之后"),
    # -- warnings
    "warn_files": (
        "{file}: {stage} was measured on another version of the file (sha256 differs); it is not compared",
        "{file}：{stage} 测的是该文件的另一个版本（sha256 不同），不作比较",
    ),
    "warn_num": (
        "{file}: {stage} was measured on {own} rows, others on {other}; it is not compared",
        "{file}：{stage} 测了 {own} 行，其余为 {other} 行，不作比较",
    ),
    "warn_settings": (
        "{file}: {stage} was measured with another {settings}; what depends on that is not compared",
        "{file}：{stage} 的测量设置不同（{settings}），受其影响的指标不作比较",
    ),
    "warn_stale": (
        "{stage}: its eval/ was measured before the stage was trained anew; it is not used",
        "{stage}：eval/ 是重新训练之前测的，不予采用",
    ),
    "warn_leak": (
        "{file}: {stage} has seen {seen} of {num} rows in training; its numbers there are too good",
        "{file}：{stage} 训练时见过 {num} 行中的 {seen} 行，其数字偏高",
    ),
    "warn_parent": (
        "{stage} came from an earlier {parent}, which has been trained anew since then",
        "{stage} 来自更早的 {parent}，后者此后已重新训练",
    ),
    "warn_skipped": ("{stage}: check {check} was skipped", "{stage}：检查 {check} 被跳过"),
    "warn_failed": ("{stage}: check {check} did not hold", "{stage}：检查 {check} 未通过"),
    "warnings": ("Please note", "请注意"),
    "left_out": (
        "Left out, since a later run moved them aside: {names}.",
        "未列入（已被后来的运行移到一旁）：{names}。",
    ),
    # -- questions
    "questions": ("The same questions, every answer", "同样的问题，每个阶段的回答"),
    "questions_about": (
        "Greedy answers to held-out questions, chosen evenly through the file and not by result. What models write is "
        "no medical advice.",
        "对留出问题的贪心解码回答；题目在文件中均匀选取，与结果无关。模型的输出不是医疗建议。",
    ),
    "no_questions": (
        "Nobody has been asked yet. eval_benchmark.py on a file of questions writes the answers that are shown here.",
        "还没有提过问。用 eval_benchmark.py 测一个问答文件，这里就会显示各阶段的回答。",
    ),
    "reference": ("Reference", "参考答案"),
    "earlier_turns": ("after {count} earlier turns", "此前已有 {count} 轮对话"),
    "tokens": ("{count} tokens", "{count} token"),
    "ended": ("ended by itself", "自行结束"),
    "cut_off": ("cut off at the limit", "到上限被截断"),
    "too_long": ("the question did not fit", "问题超长"),
    "scored": ("RM score {score}", "奖励分 {score}"),
    "empty_answer": ("(empty answer)", "（空回答）"),
    "whole": ("Show whole answers", "显示全文"),
    "more_chars": ("… {count} more characters", "……其余 {count} 个字符"),
    # -- stages
    "stages": ("Stage by stage", "逐阶段"),
    "stages_about": (
        "Light line: training. Dark line and dots: held-out rows. Every panel has its own scale.",
        "浅线：训练；深线与点：留出数据。每幅图各有刻度。",
    ),
    "training": ("training", "训练"),
    "held_out": ("held-out", "留出"),
    "no_curves": ("no log was kept", "没有留下日志"),
    "turned": (
        "Held-out loss was lowest at step {step} ({low}) and rose to {last} by the end: a sign of overfitting.",
        "留出损失在第 {step} 步最低（{low}），到结束升至 {last}：有过拟合的迹象。",
    ),
    "samples": ("Answers while training", "训练中的回答"),
    "at_step": ("step {step}", "第 {step} 步"),
    "score": ("score {score}", "得分 {score}"),
    # -- checks
    "checks": ("Proof", "证明"),
    "checks_about": (
        "Checks that each run made of itself, and that would have stopped it.",
        "每次运行对自身的检查；任何一项不成立都会中止运行。",
    ),
    "check": ("Check", "检查"),
    "passed": ("passed", "通过"),
    "failed": ("did not hold", "未通过"),
    "skipped": ("skipped", "跳过"),
    "limit": ("Limit", "界限"),
    "found": ("Found", "结果"),
    "details": ("Values and limits", "数值与界限"),
    # -- data
    "data": ("Every row accounted for", "每一行数据的去向"),
    "data_about": (
        "Rows read are rows used plus rows dropped, always. Bars show shares of the rows read.",
        "读入的行数恒等于使用与丢弃之和。条形为占读入行数的比例。",
    ),
    "split_train": ("training", "训练"),
    "split_validation": ("held-out", "留出"),
    "read": ("Read", "读入"),
    "used": ("Used", "使用"),
    "dropped": ("Dropped", "丢弃"),
    "truncated": ("Truncated", "截断"),
    "tokens_used": ("Tokens", "Token"),
    "tokens_trained": ("Learnt", "计入损失"),
    "files": ("Files", "文件"),
    "repaired": ("repaired: {kind}", "修复：{kind}"),
    "none": ("none", "无"),
    # -- cost
    "cost": ("Memory and time", "内存与时间"),
    "cost_about": (
        "Peak memory as predicted before loading and as measured; wall time of training, and of measuring where "
        "known.",
        "载入前预测的内存峰值与实测值；训练的用时，以及已知的测量用时。",
    ),
    "memory": ("Peak memory on a device", "单设备内存峰值"),
    "predicted": ("predicted", "预测"),
    "measured": ("measured", "实测"),
    "memory_note": (
        "On a CPU the measured peak is resident memory and holds the libraries too, which the prediction leaves out.",
        "在 CPU 上，实测值为常驻内存，含各程序库；预测值不含。",
    ),
    "measuring": ("+ {time} to measure it", "另测量 {time}"),
    "time": ("Wall time of training", "训练用时"),
    # -- commands
    "commands": ("Commands and versions", "命令与版本"),
    "commands_about": ("What was run, to run it again.", "实际运行的命令，可照样重跑。"),
    "copy": ("Copy", "复制"),
    "copied": ("Copied", "已复制"),
    "fingerprint": ("Fingerprint", "指纹"),
    "base_fingerprint": ("Base", "基座"),
    "seed": ("Seed", "随机种子"),
    "created": ("Finished", "完成于"),
    "versions": ("Versions", "版本"),
    "versions_differ": ("Stages ran with different versions of: {names}", "各阶段版本不同：{names}"),
    "template": ("Template", "模板"),
    "no_command": ("no command was recorded", "没有记录命令"),
    # -- foot
    "about": ("About this page", "关于本页"),
    "disclaimer": (
        "Research software. Nothing on this page, and nothing that these models write, is medical advice; do not "
        "use it to make decisions about anybody's health. In an emergency call your local emergency number.",
        "仅供研究。本页内容与这些模型的任何输出都不是医疗建议，请勿据此作出健康决定。遇到紧急情况请立即拨打当地急"
        "救电话。",
    ),
    "reproduce": (
        "Made from the files that the stages wrote; the same facts for machines stand beside it in {file}. Again:",
        "本页由各阶段写下的文件生成；供程序读取的同样事实在旁边的 {file}。重新生成：",
    ),
    "made": ("Made {when} from {directory}", "{when} 由 {directory} 生成"),
}


def both(key: str, **values: object) -> tuple[str, str]:
    """A text in English and Chinese, filled in; a value may be such a pair itself.

    A value that is marked up (markupsafe.Markup) makes the text so, and the other values in it are escaped.
    """
    filled = []
    for place, form in enumerate(TEXT[key]):
        own = {name: value[place] if isinstance(value, tuple) else value for name, value in values.items()}
        filled.append(kind_of(own.values())(form).format(**own))
    return tuple(filled)


def kind_of(values: Iterable) -> type[str]:
    """The class of marked up text if there is one among the values, else str."""
    return next((type(value) for value in values if hasattr(value, "__html__")), str)


# -- numbers ---------------------------------------------------------------------------------------------------------


def show(value: float | None, kind: str = "number") -> str:
    """A number for people.

    Args:
        value: the number.
        kind: "share" (of 1, shown in percent), "signed", "count", "tenth" (one decimal), or "number": three
            significant digits.
    """
    if value is None:
        return NOTHING
    if kind == "share":
        return f"{100 * value:.1f}%"
    if kind in ("count", "tenth"):
        return f"{value:,.{int(kind == 'tenth')}f}"
    sign = "+" if kind == "signed" else ""
    if value == 0:
        return "0"
    size = abs(value)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 or kind == "signed" else 3
    if size < 0.001:
        return f"{value:{sign}.1e}".replace("-", "−")
    return f"{value:{sign},.{digits}f}".replace("-", "−")


def show_seconds(seconds: float | None) -> tuple[str, str]:
    """A duration in English and Chinese: its two largest units."""
    if seconds is None:
        return NOTHING, NOTHING
    whole = round(seconds)
    if whole < 60:
        short = f"{seconds:.1f}" if seconds < 10 else str(whole)
        return f"{short} s", f"{short} 秒"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s", f"{whole // 60} 分 {whole % 60} 秒"
    return f"{whole // 3600} h {whole % 3600 // 60} min", f"{whole // 3600} 小时 {whole % 3600 // 60} 分"


def show_bytes(count: float | None) -> str:
    """Bytes in MiB or GiB."""
    if count is None:
        return NOTHING
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def show_parameters(count: int | None) -> str:
    """A number of parameters in millions or billions."""
    if count is None:
        return NOTHING
    return f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"
