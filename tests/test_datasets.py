"""The public data sets people train medical models on, in the schemas they are published in, and what becomes of rows.

The records are invented for this file; field names, nesting, marks and quirks are the data sets' own. The numbers are
those of docs/data.md. What is expected is written out by hand.
"""

import json

import pytest
from test_formats import assistant, call, said, system, tool, user

from stagekit.choices import first_option, needs_first_option
from stagekit.data import accept_conversation, accept_preference, accept_text
from stagekit.formats import to_canonical
from stagekit.prompts import Prompt, accept_prompt
from stagekit.records import (
    Choice,
    Conversation,
    Message,
    Preference,
    Question,
    Ranking,
    RowError,
    Rubric,
    Text,
    Tree,
    Unused,
)
from stagekit.trees import grow_trees

MERGED = "neighbouring messages of one speaker merged"
LEADING = "answer before the first question dropped"
TRAILING = "turn after the last answer dropped"
EMPTY = "empty message dropped"
HTML = "HTML turned into text"
MISSPELT = "misspelt speaker's mark read"
NO_BREAK = "missing line break before a speaker's mark"
PARTED = "dialogues compared from where they part"


def pair(prompt, chosen, rejected):
    """A preference between two answers of one message."""
    return Preference(prompt, [assistant(chosen)], [assistant(rejected)])


def dialogue(*texts):
    """A conversation in which user and assistant take turns."""
    return Conversation([(user, assistant)[place % 2](text) for place, text in enumerate(texts)])


FOUR = {"A": "碘", "B": "铁", "C": "锌", "D": "钙"}
PAGE = (
    '<div class="markdown prose w-full break-words"><p>Use <code>sum</code> &amp; a <strong>list</strong>:</p>'
    '<pre><div class="bg-black"><div class="flex"><span>python</span><button class="flex"><svg><path d="M1"></path>'
    '</svg>Copy code</button></div><div><code class="language-python"><span class="hljs-built_in">sum</span>([<span>1'
    "</span>, 2])\n# &lt;done&gt;\n</code></div></div></pre><ol><li><p>fast</p></li><li>short<ul><li>one line</li>"
    "</ul></li></ol><p>1 / 2</p></div>"
)
PAGE_TEXT = "Use `sum` & a **list**:\n\n```python\nsum([1, 2])\n# <done>\n```\n\n1. fast\n2. short\n  - one line"
MOSS_RULES = (
    "You are MOSS.\nCapabilities and tools that MOSS can possess.\n- Inner thoughts: enabled.\n- Web search: enabled. "
    "API: Search(query)\n- Calculator: enabled. API: Calculate(expression)\n"
)


def moss_turn(human, moss, thoughts="None", commands="None", results="<|Results|>: None<eor>\n"):
    return {
        "Human": f"<|Human|>: {human}<eoh>\n",
        "Inner Thoughts": f"<|Inner Thoughts|>: {thoughts}<eot>\n",
        "Commands": f"<|Commands|>: {commands}<eoc>\n",
        "Tool Responses": results,
        "MOSS": f"<|MOSS|>: {moss}<eom>\n",
    }


def node(name, parent, role, text, replies=None, **more):
    """A message of OpenAssistant, in a tree where `replies` is a list."""
    tree = {} if replies is None else {"replies": replies}
    return {"message_id": name, "parent_id": parent, "text": text, "role": role, "lang": "en", **more, **tree}


def flat(name, parent, role, text, rank=None, **more):
    """A row of OpenAssistant's parquet file."""
    return {
        **{"message_id": name, "parent_id": parent, "user_id": "u", "created_date": "2023-02-05T10:00:00+00:00"},
        **{"text": text, "role": role, "lang": "en", "review_count": 3, "review_result": True, "deleted": False},
        **{"rank": rank, "synthetic": False, "model_name": None, "detoxify": None, "message_tree_id": "m1"},
        **{"tree_state": "ready_for_export", "emojis": {"name": ["+1"], "count": [2]}, "labels": None, **more},
    }


def cmb(**more):
    return {
        **{
            "exam_type": "药师考试",
            "exam_class": "执业药师",
            "exam_subject": "营养学",
            "question": "缺哪种元素会贫血？",
        },
        **{"answer": "B", "question_type": "单项选择题", "option": {**FOUR, "E": "", "F": None}, **more},
    }


GSM = "She buys 3*12=<<3*12=36>>36 cups.\nShe sells them for 36*50=<<36*50=1800>>1800.\n#### 1,800"
DATASETS = {
    "1a shibing624/medical pretrain": [({"text": "退热首先要多饮水。"}, Text("退热首先要多饮水。"), {})],
    "1b shibing624/medical finetune": [
        (
            {"instruction": "夜里咳嗽怎么缓解？", "input": "", "output": "抬高枕头，保持空气湿润。"},
            dialogue("夜里咳嗽怎么缓解？", "抬高枕头，保持空气湿润。"),
            {},
        ),
        (
            {
                "instruction": "If you are a doctor, please answer the question.",
                "input": "My ear hums at night. What now?",
                "output": "Have it looked at if it lasts.",
            },
            dialogue(
                "If you are a doctor, please answer the question.\nMy ear hums at night. What now?",
                "Have it looked at if it lasts.",
            ),
            {},
        ),
    ],
    "1c shibing624/medical reward": [
        (
            {
                "question": "牙龈出血怎么办？",
                "response_chosen": "先洁牙，改用软毛牙刷。",
                "response_rejected": "没事。",
            },
            pair([user("牙龈出血怎么办？")], "先洁牙，改用软毛牙刷。", "没事。"),
            {},
        )
    ],
    "2 shibing624/huatuo_medical_qa_sharegpt": [
        (
            {"conversations": said(("human", "吃药后能喝茶吗？"), ("gpt", "隔一小时再喝。"))},
            dialogue("吃药后能喝茶吗？", "隔一小时再喝。"),
            {},
        )
    ],
    "3 FreedomIntelligence/HuatuoGPT-sft-data-v1": [
        (
            {"data": ["问：多久量一次血压？", "答：每天早晚各一次。", "问：饭前还是饭后？", "答：饭前。"]},
            dialogue("多久量一次血压？", "每天早晚各一次。", "饭前还是饭后？", "饭前。"),
            {},
        ),
        (
            {"data": ["患者: 手麻。", "医生：哪一侧？", "左侧。", "睡姿压迫常见，换个姿势。", "问：谢谢"]},
            dialogue("手麻。", "哪一侧？", "左侧。", "睡姿压迫常见，换个姿势。"),
            {TRAILING: 1},
        ),
    ],
    "4 Linly-AI/Chinese-pretraining-dataset": [
        ({"text": "山谷里起了风。"}, Text("山谷里起了风。"), {}),
        ({"passage": "山谷里起了风。", "id": 3}, Text("山谷里起了风。"), {}),
    ],
    "5 pleisto/wikipedia-cn-20230720-filtered": [
        (
            {"completion": "青石镇是一座虚构的小镇。", "source": "wikipedia.zh2307"},
            Text("青石镇是一座虚构的小镇。"),
            {},
        )
    ],
    "6 shibing624/sharegpt_gpt4": [
        (
            {"conversations": said(("gpt", "Part two."), ("human", "Shorter."), ("gpt", "Two."), ("human", "Thanks"))},
            dialogue("Shorter.", "Two."),
            {LEADING: 1, TRAILING: 1},
        )
    ],
    "7 anon8231489123/ShareGPT_Vicuna_unfiltered": [
        (
            {"id": "aB3_0", "conversations": said(("human", "A title?"), ("gpt", "Dawn."), ("gpt", "Or: Dusk."))},
            dialogue("A title?", "Dawn.\n\nOr: Dusk."),
            {MERGED: 1},
        ),
        (
            {
                "id": "aB3_1",
                "conversations": said(("user", "One"), ("human", "Two"), ("chatgpt", ""), ("bing", "Three")),
            },
            dialogue("One\n\nTwo", "Three"),
            {MERGED: 1, EMPTY: 1},
        ),
    ],
    "8 BelleGroup/train_0.5M_CN": [
        (
            {"instruction": "写一句提示语。\\n不超过十个字。", "input": "", "output": "请随手关灯。"},
            dialogue("写一句提示语。\\n不超过十个字。", "请随手关灯。"),
            {},
        )
    ],
    "9 BelleGroup/train_1M_CN": [
        (
            {"instruction": "用一个词形容秋天。", "input": "", "output": "\n凉爽"},
            dialogue("用一个词形容秋天。", "\n凉爽"),
            {},
        )
    ],
    "10 Stanford Alpaca": [
        (
            {"instruction": "Make it polite.", "input": "Go away.", "output": "Could you leave, please?"},
            dialogue("Make it polite.\nGo away.", "Could you leave, please?"),
            {},
        ),
        (
            {
                **{"instruction": "Name a root vegetable.", "input": "", "output": "Beetroot."},
                "text": "Below is an instruction. … ### Response:\nBeetroot.",
            },
            dialogue("Name a root vegetable.", "Beetroot."),
            {},
        ),
    ],
    "11 shibing624/alpaca-zh": [
        (
            {"instruction": "用词语造句。", "input": "输入：懒洋洋", "output": "猫懒洋洋地晒太阳。"},
            dialogue("用词语造句。\n懒洋洋", "猫懒洋洋地晒太阳。"),
            {"word 'input' before an input removed": 1},
        ),
        (
            {"instruction": "说一个成语。", "input": "<无输入>", "output": "画龙点睛。"},
            dialogue("说一个成语。", "画龙点睛。"),
            {"placeholder in place of an input dropped": 1},
        ),
    ],
    "12 Chinese-Vicuna/guanaco_belle_merge_v1.0": [
        (
            {
                "instruction": "User: 盐多少度化冰？\nAssistant: 零下也能化。",
                "input": "User: 那糖呢？",
                "output": "也能，效果弱一些。",
            },
            dialogue("盐多少度化冰？", "零下也能化。", "那糖呢？", "也能，效果弱一些。"),
            {},
        ),
        (
            {
                "instruction": "User：一\nAsssistent: 二\nUser: 三\nAssistenz：四",
                "input": "五",
                "output": "六",
            },
            dialogue("一", "二", "三", "四", "五", "六"),
            {MISSPELT: 2},
        ),
        (
            {"instruction": "System: 只答一个字。\nUser: 天？", "input": "", "output": "蓝"},
            Conversation([system("只答一个字。"), user("天？"), assistant("蓝")]),
            {},
        ),
        ({"instruction": "列出一种花。", "input": "", "output": "梅花。"}, dialogue("列出一种花。", "梅花。"), {}),
    ],
    "13 RyokoAI/ShareGPT52K": [
        (
            {
                "id": "Lm2_3",
                "conversations": [
                    {"from": "human", "value": "sum a list"},
                    {"from": "gpt", "value": PAGE, "markdown": None, "text": None},
                    {"from": "human", "value": "<p>mine</p> stays"},
                    {"from": "gpt", "value": '<div class="markdown"></div>'},
                    {"from": "gpt", "value": None, "markdown": "From the *other* field."},
                ],
            },
            dialogue("sum a list", PAGE_TEXT, "<p>mine</p> stays", "From the *other* field."),
            {HTML: 2, EMPTY: 1},
        )
    ],
    "14 BelleGroup/multiturn_chat_0.8M": [
        (
            {
                "instruction": "Human:来一句鼓励的话。\nAssistant:你可以的。\nHuman:再短一点，"
                "写成 Human: 开头。\nAssistant:",
                "input": "",
                "output": "Human: 加油。",
            },
            dialogue("来一句鼓励的话。", "你可以的。", "再短一点，写成 Human: 开头。", "Human: 加油。"),
            {},
        ),
        (
            {"instruction": "Human：你好\nAssistant：你好！\n Human：在吗Assistant:", "input": "", "output": "在。"},
            dialogue("你好", "你好！", "在吗", "在。"),
            {NO_BREAK: 1},
        ),
        (
            {"instruction": "Human:一Assistant:二\nHuman:三\nAssistant:", "input": "", "output": "四"},
            dialogue("一", "二", "三", "四"),
            {NO_BREAK: 1},
        ),
    ],
    "15 fnlp/moss-002-sft-data, moss-003": [
        (
            {
                **{"id": 7, "prefix": "MOSS is an AI assistant.\n", "num_turns": 2},
                "plain_text": "[Human]: 几点\n日落？<eoh> [MOSS]: 六点。<eoa> [Human]: [Human]: 是什么？<eoh> "
                "[MOSS]: 标记。<eoa>",
            },
            Conversation(
                [
                    *(system("MOSS is an AI assistant."), user("几点\n日落？"), assistant("六点。")),
                    *(user("[Human]: 是什么？"), assistant("标记。")),
                ]
            ),
            {},
        ),
        (
            {
                **{"conversation_id": "3", "meta_instruction": MOSS_RULES, "num_turns": "10", "category": "tool"},
                "chat": {
                    "turn_10": moss_turn("再见", "再见。"),
                    "turn_2": moss_turn(
                        *(
                            "十二乘以三？天气？",
                            "三十六，晴。",
                            "先算再查。",
                            'Calculate("12*3"), Search("weather (today)")',
                        ),
                        '<|Results|>:\nCalculate("12*3") => 36\nSearch("weather (today)") =>\n<|1|>: sunny\n<eor>\n',
                    ),
                    "turn_1": moss_turn("一加一？", "二。"),
                },
            },
            Conversation(
                [
                    *(system(MOSS_RULES.strip()), user("一加一？"), assistant("二。"), user("十二乘以三？天气？")),
                    {
                        **call(("Calculate", {"expression": "12*3"}), ("Search", {"query": "weather (today)"})),
                        "content": "<think>\n先算再查。\n</think>\n\n",
                    },
                    tool('Calculate("12*3") => 36\nSearch("weather (today)") =>\n<|1|>: sunny'),
                    *(assistant("三十六，晴。"), user("再见"), assistant("再见。")),
                ]
            ),
            {},
        ),
    ],
    "16 FreedomIntelligence/ShareGPT-CN": [
        (
            {"id": "k9", "conversations": said(("human", "给狗起名"), ("gpt", "叫“米粒”。")), "lang": "zh"},
            dialogue("给狗起名", "叫“米粒”。"),
            {},
        )
    ],
    "17 zhuangxialie/Llama3-Chinese-Dataset": [
        (
            {"conversations": said(("human", "改成否定句：他来了"), ("gpt", "他没来。"))},
            dialogue("改成否定句：他来了", "他没来。"),
            {},
        ),
        (
            {"instruction": "改成否定句", "input": "他来了", "output": "他没来。"},
            dialogue("改成否定句\n他来了", "他没来。"),
            {},
        ),
    ],
    "18 shibing624/roleplay-zh-sharegpt-gpt4-data": [
        (
            {
                "id": "rp-1",
                "system_prompt": "你是船长。",
                "conversations": said(("human", "去哪？"), ("gpt", "向南。")),
            },
            Conversation([system("你是船长。"), user("去哪？"), assistant("向南。")]),
            {},
        ),
        (
            {
                "system_prompt": "你是船长。",
                "conversations": said(("system", "你是水手。"), ("human", "去哪？"), ("gpt", "问船长。")),
            },
            Conversation([system("你是水手。"), user("去哪？"), assistant("问船长。")]),
            {},
        ),
    ],
    "19 shibing624/DPO-En-Zh-20k-Preference": [
        (
            {
                **{"system": "简短回答。", "history": [["怎样学画？", "每天画十分钟。"]], "question": "用什么笔？"},
                **{"response_chosen": "软铅笔就够。", "response_rejected": "都行。"},
            },
            pair(
                [system("简短回答。"), user("怎样学画？"), assistant("每天画十分钟。"), user("用什么笔？")],
                "软铅笔就够。",
                "都行。",
            ),
            {},
        ),
        (
            {
                "system": "",
                "history": [],
                "question": "吃什么？",
                "response_chosen": "面。",
                "response_rejected": "嗯。",
            },
            pair([user("吃什么？")], "面。", "嗯。"),
            {},
        ),
        (
            {
                "conversations": said(("human", "推荐一种汤")),
                "chosen": {"from": "gpt", "value": "番茄汤。"},
                "rejected": {"from": "gpt", "value": "不知道。"},
            },
            pair([user("推荐一种汤")], "番茄汤。", "不知道。"),
            {},
        ),
    ],
    "20 OpenAssistant/oasst1": [
        (
            flat("m1", None, "prompter", "How do I dry mint?"),
            Message("m1", None, "user", "How do I dry mint?", None, "en"),
            {},
        ),
        (
            flat("m2", "m1", "assistant", "Hang it up.", 0),
            Message("m2", "m1", "assistant", "Hang it up.", 0, "en"),
            {},
        ),
        (
            {
                **{"message_tree_id": "m1", "tree_state": "ready_for_export"},
                "prompt": {
                    **{"message_id": "m1", "text": "How do I dry mint?", "role": "prompter", "lang": "en"},
                    "replies": [
                        node("m2", "m1", "assistant", "Wait.", [], rank=1, labels={"quality": {"value": 0.1}}),
                        node("m3", "m1", "assistant", "Unranked.", []),
                        node(
                            "m4", "m1", "assistant", "Gone.", [node("m5", "m4", "prompter", "Why?", [])], deleted=True
                        ),
                        node("m6", "m1", "assistant", "Spam.", [], review_result=False),
                        node("m7", "m1", "assistant", "Hang it up.", [node("m8", "m7", "prompter", "Where?")], rank=0),
                    ],
                },
            },
            Tree(
                *("user", "How do I dry mint?", None, "en"),
                [
                    Tree("assistant", "Hang it up.", 0, "en", [Tree("user", "Where?", None, "en", [])]),
                    Tree("assistant", "Wait.", 1, "en", []),
                    Tree("assistant", "Unranked.", None, "en", []),
                ],
            ),
            {"message of a tree left out with its replies": 2},
        ),
        (
            {"text": "Hi", "role": "prompter", "replies": [{"text": "Hello", "role": "assistant", "replies": []}]},
            Tree("user", "Hi", None, "", [Tree("assistant", "Hello", None, "", [])]),
            {},
        ),
    ],
    "21 tasksource/oasst1_pairwise_rlhf_reward": [
        (
            {
                **{"lang": "en", "parent_id": "0c-a", "chosen": "A week.", "rejected": "For ever."},
                "prompt": "prompter: How long does rice keep?\nThe cooked kind.\nassistant: A day.\n"
                "As assistant: cooled.\nprompter: And frozen?",
            },
            pair(
                [
                    user("How long does rice keep?\nThe cooked kind."),
                    assistant("A day.\nAs assistant: cooled."),
                    user("And frozen?"),
                ],
                "A week.",
                "For ever.",
            ),
            {},
        )
    ],
    "22 Dahoas/full-hh-rlhf": [
        (
            {
                "prompt": "\n\nHuman: How do I fold a map?\n\nAssistant:",
                **{"response": " Along its creases.", "chosen": " Along its creases.", "rejected": " Roll it."},
            },
            pair([user("How do I fold a map?")], "Along its creases.", "Roll it."),
            {},
        )
    ],
    "23 Dahoas/static-hh": [
        (
            {
                "prompt": "\n\nHuman: Write a play.\nHuman: a line\n\nAssistant: One\n\nHuman: More\n\nAssistant:",
                **{"response": " Two", "chosen": " Two", "rejected": " No"},
            },
            pair([user("Write a play.\nHuman: a line"), assistant("One"), user("More")], "Two", "No"),
            {},
        )
    ],
    "24 Dahoas/rm-static": [
        (
            {
                "prompt": "\n\nHum: Is tea old?\n\nAssistant: Yes.\n\nHuman: How old?\n\nAssistant:",
                **{"response": " Very.", "chosen": " Very.", "rejected": " It is."},
            },
            pair([user("Is tea old?"), assistant("Yes."), user("How old?")], "Very.", "It is."),
            {MISSPELT: 1},
        )
    ],
    "25 liswei/rm-static-m2m100-zh": [
        (
            {"prompt": "\n\nHuman: 地圖怎麼摺？\n\nAssistant:", "chosen": " 照原來的摺痕。", "rejected": " 捲起來。"},
            pair([user("地圖怎麼摺？")], "照原來的摺痕。", "捲起來。"),
            {},
        ),
        (
            {"prompt": "地圖怎麼摺？", "chosen": "照摺痕。", "rejected": "不。"},
            pair([user("地圖怎麼摺？")], "照摺痕。", "不。"),
            {},
        ),
        (
            {
                "prompt": "Human：地圖？\nAssistant：有。\nHuman:多大？\nAssistant：",
                "chosen": "小。",
                "rejected": "不。",
            },
            pair([user("地圖？"), assistant("有。"), user("多大？")], "小。", "不。"),
            {},
        ),
    ],
    "26 yitingxie/rlhf-reward-datasets": [
        (
            {
                "prompt": "\n\nHuman: Is soup a meal?\n\nAssistant: It can be.\n\nHuman: Why?\n\n",
                **{"chosen": "Assistant: It fills.", "rejected": "Assistant: No."},
            },
            pair([user("Is soup a meal?"), assistant("It can be."), user("Why?")], "It fills.", "No."),
            {},
        )
    ],
    "27 liyucheng/zhihu_rlhf_3k": [
        (
            {
                **{"prompt": "如何早起？", "chosen": "早睡，\n固定时间。", "rejected": "设闹钟。"},
                **{"question_id": "91234.0", "upvotes_chosen": "310", "upvotes_rejected": "4"},
            },
            pair([user("如何早起？")], "早睡，\n固定时间。", "设闹钟。"),
            {},
        )
    ],
    "28 Anthropic/hh-rlhf": [
        (
            {
                "chosen": "\n\nHuman: Can dogs eat figs?\n\nAssistant: A few.\n\nHuman: Dried?\n\nAssistant: Fresh.",
                "rejected": "\n\nHuman: Can dogs eat figs?\n\nAssistant: A few.\n\nHuman: Dried?\n\nAssistant: Yes.",
            },
            pair([user("Can dogs eat figs?"), assistant("A few."), user("Dried?")], "Fresh.", "Yes."),
            {},
        ),
        (
            {
                "chosen": "\n\nHuman: Hi\n\nAssistant: One moment.\n\nAssistant: Here I am.",
                "rejected": "\n\nHuman: Hi\n\nAssistant: One moment.\n\nAssistant: No.",
            },
            pair([user("Hi")], "One moment.\n\nHere I am.", "One moment.\n\nNo."),
            {MERGED: 1},
        ),
        (
            {
                "chosen": "\n\nHuman: Hi\n\nAssistant: A\n\nHuman: B\n\nAssistant: C",
                "rejected": "\n\nHum: Hi\n\nAssistant: X\n\nHuman: Y\n\nAssistant: Z",
            },
            Preference(
                [user("Hi")],
                [assistant("A"), user("B"), assistant("C")],
                [assistant("X"), user("Y"), assistant("Z")],
            ),
            {PARTED: 1, MISSPELT: 1},
        ),
    ],
    "29 openai/gsm8k": [
        (
            {"question": "Ada buys 3 boxes of 12 cups.", "answer": GSM},
            Question([user("Ada buys 3 boxes of 12 cups.")], "1800", GSM),
            {},
        ),
        (
            {"question": "How cold?", "answer": "How much colder is it? ** 5-8=<<5-8=-3>>-3\n#### -3"},
            Question([user("How cold?")], "-3", "How much colder is it? ** 5-8=<<5-8=-3>>-3\n#### -3"),
            {},
        ),
    ],
    "30 GBaker/MedQA-USMLE-4-options": [
        (
            {
                **{"question": "A cook has a burn. First step?", "answer": "Cool water", "meta_info": "step1"},
                "options": {"A": "Butter", "B": "Cool water", "C": "Ice", "D": "B"},
                **{"answer_idx": "B", "metamap_phrases": ["cook", "burn"]},
            },
            Choice(
                "A cook has a burn. First step?",
                {"A": "Butter", "B": "Cool water", "C": "Ice", "D": "B"},
                *("B", False, "step1", "en"),
            ),
            {},
        ),
        (
            {
                **{"id": "t-1", "sent1": "A cook has a burn.", "sent2": "First step?", "label": 1},
                **{"ending0": "Butter", "ending1": "Cool water", "ending2": "Ice", "ending3": "Salt"},
            },
            Choice(
                "A cook has a burn. First step?",
                {"A": "Butter", "B": "Cool water", "C": "Ice", "D": "Salt"},
                *("B", False, None, "en"),
            ),
            {},
        ),
    ],
    "31 openlifescienceai/medmcqa": [
        (
            {
                **{"id": "x-1", "question": "Which vitamin clots?", "opa": "A", "opb": "B12", "opc": "D", "opd": "K"},
                **{"cop": cop, "choice_type": "multi", "exp": exp, "subject_name": "Physiology", "topic_name": None},
            },
            Choice(
                "Which vitamin clots?",
                {"A": "A", "B": "B12", "C": "D", "D": "K"},
                *(answer, False, "Physiology", "en", exp or ""),
            ),
            {},
        )
        for cop, answer, exp in ((3, "D", "Vitamin K is needed."), (-1, "", None))
    ],
    "32 qiaojin/PubMedQA": [
        (
            {
                **{"pubid": 100, "question": "Does tea help?", "final_decision": "maybe", "long_answer": "It may."},
                "context": {
                    **{"contexts": ["Ninety drank tea.", "Some slept."], "labels": ["METHODS", "RESULTS"]},
                    **{"meshes": ["Tea"], "reasoning_required_pred": ["m"], "reasoning_free_pred": ["m"]},
                },
            },
            Choice(
                "Ninety drank tea.\nSome slept.\nDoes tea help?",
                {"yes": "yes", "no": "no", "maybe": "maybe"},
                *("maybe", False, None, "en", "It may."),
            ),
            {},
        ),
        (
            {
                **{
                    "QUESTION": "Does tea help?",
                    "CONTEXTS": ["Ninety drank tea."],
                    "LABELS": ["METHODS"],
                    "MESHES": [],
                },
                **{"YEAR": None, "reasoning_required_pred": "no", "reasoning_free_pred": "no", "final_decision": "no"},
                "LONG_ANSWER": "It does not.",
            },
            Choice(
                "Ninety drank tea.\nDoes tea help?",
                {"yes": "yes", "no": "no", "maybe": "maybe"},
                *("no", False, None, "en", "It does not."),
            ),
            {},
        ),
        (
            {
                **{"pubid": 101, "question": "Does tea help?", "long_answer": "It may."},
                "context": {"contexts": ["Ninety drank tea."], "labels": ["METHODS"], "meshes": ["Tea"]},
            },
            Question([user("Ninety drank tea.\nDoes tea help?")], "It may.", "It may."),
            {},
        ),
    ],
    "33 FreedomIntelligence/CMB": [
        (cmb(), Choice("缺哪种元素会贫血？", FOUR, "B", False, "营养学", "zh"), {}),
        (
            cmb(answer="BC", question_type="多项选择题", explanation="铁和锌都参与造血。"),
            Choice("缺哪种元素会贫血？", FOUR, "BC", True, "营养学", "zh", "铁和锌都参与造血。"),
            {},
        ),
        (
            {name: value for name, value in cmb(id=4).items() if name != "answer"},
            Choice("缺哪种元素会贫血？", FOUR, "", False, "营养学", "zh"),
            {},
        ),
        (
            {
                **{"id": 1, "title": "病例分析-扭伤", "description": "患者，女，三十岁，踝部肿痛。"},
                "QA_pairs": [
                    {"question": "先做什么检查？", "solution": "拍片。"},
                    {"question": "怎样固定？", "solution": "弹性绷带。"},
                ],
            },
            dialogue("患者，女，三十岁，踝部肿痛。\n\n先做什么检查？", "拍片。", "怎样固定？", "弹性绷带。"),
            {},
        ),
    ],
    "34 CMExam": [
        (
            {
                **{"Question": "缺哪种元素会贫血？", "Options": "A 碘\nB 铁\nC 锌\nD 钙", "Answer": "B"},
                **{"Explanation": "铁参与造血。", "Medical Discipline": "营养"},
            },
            Choice("缺哪种元素会贫血？", FOUR, "B", False, "营养", "zh", "铁参与造血。"),
            {},
        ),
        (
            {
                "Question": "缺哪种元素会贫血？",
                "Options": [{"key": key, "value": value} for key, value in FOUR.items()],
                **{"Answer": float("nan"), "Explanation": ""},
            },
            Choice("缺哪种元素会贫血？", FOUR, "", False, None, "zh"),
            {},
        ),
    ],
    "35 FreedomIntelligence/medical-o1-reasoning-SFT": [
        (
            {"Question": "Heel pain at dawn?", "Complex_CoT": "First steps hurt.", "Response": "Plantar fasciitis."},
            Question(
                [user("Heel pain at dawn?")],
                "Plantar fasciitis.",
                "<think>\nFirst steps hurt.\n</think>\n\nPlantar fasciitis.",
            ),
            {},
        )
    ],
    "36 FreedomIntelligence/medical-o1-verifiable-problem": [
        (
            {"Open-ended Verifiable Question": "Which bone is the collar?", "Ground-True Answer": "Clavicle"},
            Question([user("Which bone is the collar?")], "Clavicle", "Clavicle"),
            {},
        )
    ],
    "37 HealthBench": [
        (
            {
                **{"prompt_id": "p-1", "prompt": [user("I feel dizzy.")], "example_tags": ["theme:context_seeking"]},
                "rubrics": [
                    {"criterion": "Asks since when", "points": 7, "tags": ["axis:completeness"]},
                    {"criterion": "Names one certain cause", "points": -5, "tags": []},
                ],
                "ideal_completions_data": {"ideal_completion": "Since when?", "ideal_completions_group": "g"},
                "canary": "healthbench:none",
            },
            Rubric(
                [user("I feel dizzy.")],
                [
                    {"criterion": "Asks since when", "points": 7, "tags": ["axis:completeness"]},
                    {"criterion": "Names one certain cause", "points": -5, "tags": []},
                ],
                "Since when?",
            ),
            {},
        ),
        (
            {
                **{"prompt_id": "p-2", "prompt": [user("Hi"), assistant("Hello"), user("I feel dizzy.")]},
                "rubrics": [{"criterion": "Asks since when", "points": 7, "tags": []}],
                **{"ideal_completions_data": None, "canary": "healthbench:none"},
            },
            Rubric(
                [user("Hi"), assistant("Hello"), user("I feel dizzy.")],
                [{"criterion": "Asks since when", "points": 7, "tags": []}],
                "",
            ),
            {},
        ),
    ],
}
ROWS = [(name, *row) for name, rows in DATASETS.items() for row in rows]
FIRST_OPTION = {"31": 0}  # what the whole file says
LETTERS = dict.fromkeys(("1a", "4", "5"), "T")
LETTERS |= dict.fromkeys(("1c", "19", "21", "22", "23", "24", "25", "26", "27"), "P")
LETTERS |= dict.fromkeys(("1b", "8", "9", "10", "11"), "I") | dict.fromkeys(("2", "6", "7", "13", "16", "18"), "C")
LETTERS |= dict.fromkeys(("30", "31", "32", "33", "34"), "Q") | dict.fromkeys(("29", "36"), "V")
LETTERS |= {"3": "L", "12": "E", "14": "E", "15": "M", "17": "C", "20": "O", "28": "H", "35": "R", "37": "B"}


def number_of(name):
    return name.split(" ")[0]


def test_there_is_a_record_of_each_of_the_37_data_sets():
    numbers = [number_of(name) for name in DATASETS]
    assert numbers == ["1a", "1b", "1c", *(str(number) for number in range(2, 38))]
    assert set(LETTERS) == set(numbers)


@pytest.mark.parametrize(("name", "record", "expected", "repaired"), ROWS, ids=[row[0] for row in ROWS])
def test_a_row_of_a_public_data_set_becomes_the_canonical_record(name, record, expected, repaired):
    before = json.dumps(record)
    canonical, repairs = to_canonical(record, first_option=FIRST_OPTION.get(number_of(name)))
    assert canonical == expected
    assert dict(repairs.counts) == repaired
    assert json.dumps(record) == before, "the record itself was changed"


@pytest.mark.parametrize("name", DATASETS)
def test_the_first_row_of_a_data_set_is_recognised_by_its_own_adapter(name):
    from stagekit.formats import _find_adapter

    record = DATASETS[name][0][0]
    assert _find_adapter(record, "auto")[0].code == LETTERS[number_of(name)]


# -- rows that are left out ------------------------------------------------------------------------------------------

LEFT_OUT = {
    "hh: an answer that is empty": (
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: "},
        "empty answer",
    ),
    "hh: no question in common": (
        {"chosen": "\n\nHuman: Hi\n\nAssistant: A", "rejected": "\n\nHuman: Bye\n\nAssistant: A"},
        "the two answers belong to different questions",
    ),
    "hh: the last questions differ": (
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: A\n\nHuman: B\n\nAssistant: C",
            "rejected": "\n\nHuman: Hi\n\nAssistant: A\n\nHuman: D\n\nAssistant: E",
        },
        "the two answers belong to different questions",
    ),
    "ShareGPT: an empty dialogue": ({"id": "a", "conversations": []}, "empty dialogue"),
    "ShareGPT: a dialogue of answers": ({"conversations": said(("gpt", "A"))}, "no question followed by an answer"),
    "HuatuoGPT: an empty list": ({"data": []}, "empty dialogue"),
    "zhihu: an empty cell": ({"prompt": "早起？", "chosen": "早睡。", "rejected": float("nan")}, "empty answer"),
    "Alpaca: an empty output": ({"instruction": "Draw a cat.", "input": "", "output": ""}, "empty answer"),
    "LLaMA-Factory: a chosen message that is empty": (
        {
            "conversations": said(("human", "Q")),
            "chosen": {"from": "gpt", "value": " "},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        "empty answer",
    ),
    "TRL: a rejected message that is null": (
        {"prompt": [user("Q")], "chosen": [assistant("good")], "rejected": [assistant(None)]},
        "empty answer",
    ),
    "Alpaca: a null output": ({"instruction": "Draw a cat.", "input": None, "output": None}, "empty answer"),
    "C4: a null text": ({"text": None, "url": "u"}, "empty text"),
    "oasst: deleted": (flat("m", None, "prompter", "Hi", deleted=True), "deleted"),
    "oasst: rejected in review": (flat("m", None, "prompter", "Hi", review_result=False), "rejected in review"),
    "oasst: an empty message": (flat("m", None, "prompter", " "), "empty text"),
    "Wikipedia: an empty page": ({"completion": "", "source": "wikipedia.zh2307"}, "empty text"),
    "LLaMA-Factory: a picture": (
        {"messages": [user("<image>What is it?"), assistant("A cat.")], "images": ["1.jpg"]},
        "comes with images, sound or video",
    ),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_row_with_nothing_to_learn_from_is_left_out_with_its_reason(name):
    record, reason = LEFT_OUT[name]
    with pytest.raises(Unused) as left_out:
        to_canonical(record)
    assert left_out.value.reason == reason


# -- what only a whole file tells ------------------------------------------------------------------------------------


def medmcqa(cop):
    return {**DATASETS["31 openlifescienceai/medmcqa"][0][0], "cop": cop}


def test_the_key_of_medmcqa_needs_the_whole_file_and_is_refused_without():
    assert needs_first_option(medmcqa(2)) and not needs_first_option(medmcqa(-1)) and not needs_first_option(cmb())
    with pytest.raises(RowError, match="--first_option 0 or 1"):
        to_canonical(medmcqa(2))
    for numbers, letter in (((2, 0, 3), "C"), ((2, 4, 1), "B")):
        first = first_option(medmcqa(number) for number in numbers)
        assert to_canonical(medmcqa(2), first_option=first)[0].answer == letter


def test_reading_the_numbers_of_a_file_stops_where_they_settle_it():
    def rows():
        yield medmcqa(4)
        yield medmcqa(0)
        raise AssertionError("read on")

    assert first_option(rows()) == 0


def test_an_empty_option_does_not_shift_the_others():
    record = {**medmcqa(2), "opb": ""}
    assert to_canonical(record, first_option=0)[0].answer == "C"


def test_huatuo_o1_rows_with_all_keys_are_read_as_the_format_that_is_named():
    record = {
        **{"question": "Which bone?", "options": {"A": "rib", "B": "clavicle"}, "answer": "B"},
        **{"Open-ended Verifiable Question": "Which bone is the collar?", "Ground-True Answer": "Clavicle"},
        **{"Question": "Which bone is it?", "Complex_CoT": "Collar.", "Response": "The clavicle."},
    }
    assert isinstance(to_canonical(record)[0], Choice)
    assert to_canonical(record, "question")[0].prompt == [user("Which bone?")]
    del record["question"], record["options"]
    assert to_canonical(record, "reasoning")[0].prompt == [user("Which bone is it?")]
    assert to_canonical(record, "question")[0].answer == "Clavicle"


# -- trees -----------------------------------------------------------------------------------------------------------

ROWS_OF_A_TREE = [
    *(("m5", "m4", "prompter", "Frozen?", None), ("m3", "m1", "assistant", "Unranked.", None)),
    *(("m1", None, "prompter", "How do I dry mint?", None), ("m6", "m5", "assistant", "Yes.", 1)),
    *(("m2", "m1", "assistant", "Wait.", 2), ("m7", "m5", "assistant", "In bags.", 0)),
    *(("m4", "m1", "assistant", "Hang it up.", 0), ("m8", "m6", "prompter", "Thanks", None)),
    *(("m9", "m7", "prompter", "Which bags?", None), ("n1", "gone", "assistant", "Lost.", 0)),
    *(("n2", None, "prompter", "Nobody?", None), ("n3", "n2", "prompter", "I am here.", None)),
]
ASKED = user("How do I dry mint?")


def messages_of(*rows):
    return [to_canonical(flat(*row))[0] for row in rows]


def grown():
    trees, left_over = grow_trees(messages_of(*ROWS_OF_A_TREE))
    assert [message.id for message in left_over] == ["n1", "n3"]
    whole = [f"m{number}" for number in range(1, 10)]
    assert [sorted(message.id for message in members) for _, members in trees] == [whole, ["n2"]]
    return [tree for tree, _ in trees]


def test_rows_of_a_file_are_linked_by_their_ids_in_whatever_order_they_stand():
    tree, alone = grown()
    assert [reply.content for reply in tree.replies] == ["Hang it up.", "Wait.", "Unranked."]
    assert [reply.content for reply in tree.replies[0].replies[0].replies] == ["In bags.", "Yes."]
    assert alone == Tree("user", "Nobody?", None, "en", [])


def test_messages_that_answer_each_other_in_a_circle_belong_to_no_tree():
    circle = [Message("a", "b", "user", "1"), Message("b", "a", "assistant", "2")]
    assert grow_trees(circle) == ([], circle)


def test_a_reply_to_two_messages_of_one_name_is_linked_once():
    rows = [Message("a", None, "user", "1"), Message("a", None, "user", "2"), Message("b", "a", "assistant", "3")]
    trees, left_over = grow_trees(rows)
    assert [len(tree.replies) for tree, _ in trees] == [1, 0] and left_over == []


def test_every_thread_of_a_tree_is_a_conversation_and_no_answer_is_learnt_twice():
    threads = accept_conversation(grown()[0])
    start = [ASKED, assistant("Hang it up."), user("Frozen?")]
    seen = [ASKED, {**assistant("Hang it up."), "train": False}, user("Frozen?")]
    assert threads == [
        Conversation([*start, assistant("In bags.")]),
        Conversation([*seen, assistant("Yes.")]),
        Conversation([ASKED, assistant("Wait.")]),
        Conversation([ASKED, assistant("Unranked.")]),
    ]


def test_the_ranked_answers_of_a_tree_are_compared_at_every_question():
    later = [ASKED, assistant("Hang it up."), user("Frozen?")]
    assert accept_preference(grown()[0]) == [
        Ranking([ASKED], [[assistant("Hang it up.")], [assistant("Wait.")]], [0, 1]),
        Ranking(later, [[assistant("In bags.")], [assistant("Yes.")]], [0, 1]),
    ]


def test_every_question_of_a_tree_is_a_prompt_with_its_best_answer():
    later = [ASKED, assistant("Hang it up."), user("Frozen?")]
    assert accept_prompt(grown()[0]) == [
        Prompt([ASKED], "Hang it up."),
        Prompt(later, "In bags."),
        Prompt([*later, assistant("In bags."), user("Which bags?")], ""),
        Prompt([*later, assistant("Yes."), user("Thanks")], ""),
    ]


def test_pretraining_reads_the_best_thread_of_a_tree():
    assert accept_text(grown()[0]) == Text("How do I dry mint?\n\nHang it up.\n\nFrozen?\n\nIn bags.")


def test_a_tree_without_answers_or_ranks_is_left_out_with_its_reason():
    for accept, tree, reason in (
        (accept_conversation, Tree("user", "Q"), "a tree without an answer"),
        (accept_text, Tree("user", "Q"), "a tree without an answer"),
        (accept_preference, Tree("user", "Q", replies=[Tree("assistant", "A", 0)]), "a tree without ranked answers"),
        (
            accept_preference,
            Tree("user", "Q", replies=[Tree("assistant", text, 1) for text in "AB"]),
            "a tree without ranked answers",
        ),
    ):
        with pytest.raises(Unused) as left_out:
            accept(tree)
        assert left_out.value.reason == reason


# -- what the stages make of them ------------------------------------------------------------------------------------


def stage(accept, name, row=0):
    record = DATASETS[name][row][0]
    return accept(to_canonical(record, first_option=FIRST_OPTION.get(number_of(name)))[0])


def test_every_data_set_feeds_every_stage_that_it_can():
    """By the letter of its adapter; a bare text has no prompt, and only preferences and rankings compare."""
    for name, rows in DATASETS.items():
        record, _, _ = rows[2 if number_of(name) == "20" else 0]  # of oasst the whole tree
        canonical, _ = to_canonical(record, first_option=FIRST_OPTION.get(number_of(name)))
        letter = LETTERS[number_of(name)]
        assert isinstance(accept_text(canonical), Text)
        takers = {accept_conversation: "HSPBQVROMLCEI", accept_prompt: "HSPBQVROMLCEI", accept_preference: "HSPO"}
        for accept, letters in takers.items():
            if letter in letters:
                assert accept(canonical), name
            else:
                with pytest.raises(RowError, match="running text|compares answers"):
                    accept(canonical)


def test_fine_tuning_learns_the_key_of_multiple_choice_and_its_explanation():
    one, several, _, case = (stage(accept_conversation, "33 FreedomIntelligence/CMB", row) for row in (0, 1, 0, 3))
    asked = "缺哪种元素会贫血？\nA. 碘\nB. 铁\nC. 锌\nD. 钙\n"
    assert one == dialogue(asked + "请回答正确选项的字母。", "B. 铁")
    assert several == dialogue(
        asked + "本题有不止一个正确选项，请把正确选项的字母连在一起回答。", "BC\nB. 铁\nC. 锌\n\n铁和锌都参与造血。"
    )
    assert len(case.messages) == 4
    assert stage(accept_conversation, "32 qiaojin/PubMedQA") == dialogue(
        "Ninety drank tea.\nSome slept.\nDoes tea help?\nAnswer with yes, no or maybe.", "maybe\n\nIt may."
    )
    for name, row in (("33 FreedomIntelligence/CMB", 2), ("34 CMExam", 1), ("31 openlifescienceai/medmcqa", 1)):
        with pytest.raises(Unused) as left_out:
            stage(accept_conversation, name, row)
        assert left_out.value.reason == "no answer in the data"


def test_fine_tuning_learns_reasoning_rubrics_and_solutions():
    assert stage(accept_conversation, "35 FreedomIntelligence/medical-o1-reasoning-SFT") == dialogue(
        "Heel pain at dawn?", "<think>\nFirst steps hurt.\n</think>\n\nPlantar fasciitis."
    )
    assert stage(accept_conversation, "29 openai/gsm8k") == dialogue("Ada buys 3 boxes of 12 cups.", GSM)
    assert stage(accept_conversation, "37 HealthBench") == dialogue("I feel dizzy.", "Since when?")
    with pytest.raises(Unused):
        stage(accept_conversation, "37 HealthBench", 1)


def test_prompts_bring_the_reference_that_a_reward_can_check():
    assert stage(accept_prompt, "33 FreedomIntelligence/CMB", 1).reference == "BC"
    assert stage(accept_prompt, "33 FreedomIntelligence/CMB", 2).reference == ""
    assert stage(accept_prompt, "32 qiaojin/PubMedQA").reference == "maybe"
    assert stage(accept_prompt, "29 openai/gsm8k").reference == "1800"
    assert stage(accept_prompt, "35 FreedomIntelligence/medical-o1-reasoning-SFT").reference == "Plantar fasciitis."
    assert stage(accept_prompt, "37 HealthBench", 1).reference == ""
    assert stage(accept_prompt, "28 Anthropic/hh-rlhf") == Prompt(
        [user("Can dogs eat figs?"), assistant("A few."), user("Dried?")], "Fresh."
    )


def test_rewards_read_the_references_of_public_choices_and_numbers():
    from stagekit.rewards import is_checkable, judge_accuracy

    for name, right, wrong in (
        ("33 FreedomIntelligence/CMB", "答案是 B。", "答案是 C。"),
        ("30 GBaker/MedQA-USMLE-4-options", "Cool water", "Ice"),
        ("32 qiaojin/PubMedQA", "Maybe.", "No."),
        ("29 openai/gsm8k", "She gets 1,800.", "She gets 1,801,000."),
    ):
        prompt = stage(accept_prompt, name)
        question = prompt.prompt[-1]["content"]
        assert is_checkable(prompt.reference, question), name
        assert judge_accuracy(right, prompt.reference, question).score == 1, name
        assert judge_accuracy(wrong, prompt.reference, question).score == 0, name


def test_pretraining_reads_dialogues_and_questions_as_text():
    assert stage(accept_text, "18 shibing624/roleplay-zh-sharegpt-gpt4-data") == Text("你是船长。\n\n去哪？\n\n向南。")
    assert stage(accept_text, "1c shibing624/medical reward") == Text("牙龈出血怎么办？\n\n先洁牙，改用软毛牙刷。")
    assert stage(accept_text, "34 CMExam") == Text(
        "缺哪种元素会贫血？\n\nA. 碘\nB. 铁\nC. 锌\nD. 钙\n\nB. 铁\n\n铁参与造血。"
    )
    assert stage(accept_text, "34 CMExam", 1) == Text("缺哪种元素会贫血？\n\nA. 碘\nB. 铁\nC. 锌\nD. 钙")
    assert stage(accept_text, "37 HealthBench", 1) == Text("Hi\n\nHello\n\nI feel dizzy.")
