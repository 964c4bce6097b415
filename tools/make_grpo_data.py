"""Write the numeric part of data/grpo/ and of data/eval/verifiable.jsonl: sums from the ward with one right answer.

    python -m tools.make_grpo_data

Reads   --data_dir   eval/verifiable.jsonl there: rows that are not numeric were written by hand and stay as they are
Writes               grpo/numeric.jsonl (110 items) and eval/verifiable.jsonl (30 numeric items after the others)

Every answer is an exact fraction, proved a second way: put back, it must give what the question gave. An item whose
exact answer lies near the middle between two roundings is drawn again. Same seed, same bytes. The sums are there for
arithmetic; the substances are made up.
"""

import argparse
import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta
from fractions import Fraction
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SEED = 20240
TRAIN_PER_TEMPLATE = 5
MORE_CHINESE = 16  # of the trained templates give three Chinese and two English items, the others the reverse
HELD_OUT_ENGLISH = 10  # of the trained templates give their held-out item in English, the others in Chinese
# Closer than this (in units of the last digit) to the middle between two roundings, and a rounded intermediate
# result or another rounding rule could end on the other side.
TIE_MARGIN = Fraction(1, 20)
MONTHS = "January February March April May June July August September October November December".split()
FIRST_DAY = date(2023, 1, 1)


@dataclass(frozen=True)
class Template:
    """A kind of sum.

    Attributes:
        givens: name -> (lowest, highest, step) of what is drawn.
        solve: the exact answer from the givens.
        proves: whether the answer, put back, gives the givens; a way of its own, not `solve` once more.
        decimals: of the answer, as its wordings ask.
        unit: (Chinese, English) after the number of the answer.
        between: answers that make sense; others are drawn again.
        show: the givens as the question names them, where they are not shown as numbers.
        trained: False for a kind of sum that only the held-out file has.
    """

    name: str
    givens: dict[str, tuple[str, str, str]]
    solve: Callable[..., Fraction]
    proves: Callable[..., bool]
    decimals: int
    unit: tuple[str, str]
    between: tuple[int, int]
    zh: tuple[str, ...]
    en: tuple[str, ...]
    show: Callable[[dict, str], dict[str, str]] | None = None
    trained: bool = True


def decimal_text(number: Fraction) -> str:
    """Write a number with as many decimals as it has: 12.5, 80."""
    for decimals in range(10):
        if (number * 10**decimals).denominator == 1:
            return fixed(number, decimals)
    raise ValueError(f"{number} has no end as a decimal number")


def fixed(number: Fraction, decimals: int) -> str:
    """Round to the nearest and write with this many decimals; the caller has seen to it that it is no tie."""
    scaled = round(number * 10**decimals)
    digits = f"{abs(scaled):0{decimals + 1}d}"
    whole, rest = (digits[:-decimals], "." + digits[-decimals:]) if decimals else (digits, "")
    return ("-" if scaled < 0 else "") + whole + rest


def is_ambiguous(number: Fraction, decimals: int) -> bool:
    """Whether it lies so near to a tie that two careful people could round it differently."""
    return abs(number * 10**decimals % 1 - Fraction(1, 2)) < TIE_MARGIN


def show_dates(givens: dict, language: str) -> dict[str, str]:
    """The two days of the due-date sum as a calendar names them."""
    start = FIRST_DAY + timedelta(days=int(givens["start"]))
    days = {"start": start, "today": start + timedelta(days=int(givens["elapsed"]))}
    if language == "zh":
        return {name: f"{day.year}年{day.month}月{day.day}日" for name, day in days.items()}
    return {name: f"{day.day} {MONTHS[day.month - 1]} {day.year}" for name, day in days.items()}


def walk_to_due_date(answer: Fraction, start: Fraction, elapsed: Fraction) -> bool:
    """Go from day to day on a calendar of our own: the day after 280 days must be `answer` days after today."""
    year, month, day = FIRST_DAY.year, FIRST_DAY.month, FIRST_DAY.day
    reached = {}
    for number in range(int(start) + 281):
        reached[number] = (year, month, day)
        leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
        last = (31, 29 if leap else 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)[month - 1]
        day += 1
        if day > last:
            month, day = month + 1, 1
        if month > 12:
            year, month = year + 1, 1
    today = FIRST_DAY + timedelta(days=int(start) + int(elapsed))
    due = today + timedelta(days=int(answer))
    return reached[int(start) + 280] == (due.year, due.month, due.day) and answer.denominator == 1


def draw(template: Template, rng: random.Random) -> dict[str, Fraction]:
    """Givens from the ranges of a template, such that the answer makes sense and rounds one way only."""
    while True:
        givens = {}
        for name, bounds in template.givens.items():
            low, high, step = map(Fraction, bounds)
            givens[name] = low + step * rng.randrange(int((high - low) / step) + 1)
        answer = template.solve(**givens)
        low, high = template.between
        if low <= answer <= high and answer and not is_ambiguous(answer, template.decimals):
            return givens


def make_item(template: Template, givens: dict[str, Fraction], language: str, wording: int) -> dict:
    """One row of a data file.

    Raises:
        AssertionError: the second way does not confirm the answer, or it rounds in more than one way.
    """
    givens = {name: Fraction(value) for name, value in givens.items()}
    answer = Fraction(template.solve(**givens))
    assert not is_ambiguous(answer, template.decimals), f"{template.name} {givens}: {answer} is near a tie"
    assert template.proves(answer, **givens), f"{template.name} {givens}: {answer} does not lead back"
    number = fixed(answer, template.decimals)
    assert 2 * abs(Fraction(number) - answer) * 10**template.decimals < 1, f"{number} is not {answer} rounded"
    shown = {name: decimal_text(value) for name, value in givens.items()}
    if template.show:
        shown |= template.show(givens, language)
    wordings, unit = (template.zh, template.unit[0]) if language == "zh" else (template.en, template.unit[1])
    question = wordings[wording % len(wordings)].format(**shown)
    return {"question": question, "answer": f"{number} {unit}", "kind": "number", "language": language}


def plan() -> list[tuple[Template, str, int, bool]]:
    """(template, language, how many items, whether held out), in the order they are drawn."""
    steps = []
    trained = [template for template in TEMPLATES.values() if template.trained]
    for index, template in enumerate(trained):
        chinese = TRAIN_PER_TEMPLATE // 2 + (index < MORE_CHINESE)
        steps += [(template, "zh", chinese, False), (template, "en", TRAIN_PER_TEMPLATE - chinese, False)]
    for index, template in enumerate(trained):
        steps.append((template, "en" if index < HELD_OUT_ENGLISH else "zh", 1, True))
    for template in TEMPLATES.values():
        if not template.trained:
            steps += [(template, "zh", 1, True), (template, "en", 1, True)]
    return steps


def make_items(seed: int) -> tuple[list[dict], list[dict]]:
    """(training items, held-out items); no givens come twice in one kind of sum, whatever the language."""
    training, held_out = [], []
    generators, used, seen = {}, {}, set()
    for template, language, count, is_held_out in plan():
        key = (template.name, language)
        rng = generators.setdefault(key, random.Random(f"{seed} {template.name} {language}"))
        for _ in range(count):
            givens = draw(template, rng)
            while (template.name, *givens.values()) in seen:
                givens = draw(template, rng)
            seen.add((template.name, *givens.values()))
            used[key] = used.get(key, -1) + 1
            (held_out if is_held_out else training).append(make_item(template, givens, language, used[key]))
    return training, held_out


def as_lines(rows: list[dict]) -> str:
    """Rows as JSON, one a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def files_to_write(data_dir: Path, seed: int) -> dict[Path, str]:
    """Path -> text of the two files, without writing them."""
    training, held_out = make_items(seed)
    held_out_path = data_dir / "eval" / "verifiable.jsonl"
    by_hand = []
    if held_out_path.is_file():
        rows = map(json.loads, held_out_path.read_text(encoding="utf-8").splitlines())
        by_hand = [row for row in rows if row["kind"] != "number"]
    return {
        data_dir / "grpo" / "numeric.jsonl": as_lines(training),
        held_out_path: as_lines(by_hand + held_out),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.make_grpo_data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--data_dir", default=str(ROOT / "data"), help="folder with grpo/ and eval/ (default: data)")
    parser.add_argument("--seed", type=int, default=SEED, help="seeds the values drawn (default: %(default)s)")
    args = parser.parse_args(argv)
    for path, text in files_to_write(Path(args.data_dir), args.seed).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".part")
        temporary.write_text(text, encoding="utf-8", newline="\n")
        os.replace(temporary, path)
        print(f"saved: {path} ({text.count(chr(10))} rows)")


KINDS_OF_SUM = (
    Template(
        name="infusion_rate",
        givens={"volume": ("100", "1000", "50"), "minutes": ("30", "600", "15")},
        solve=lambda volume, minutes: volume * 60 / minutes,
        proves=lambda answer, volume, minutes: answer / 60 * minutes == volume,
        decimals=1,
        unit=("mL/h", "mL/h"),
        between=(20, 600),
        zh=(
            "一袋{volume} mL的液体要在{minutes}分钟内匀速输完，输液泵应设为多少？答案用mL/h，保留一位小数。",
            "护士要把{volume} mL溶液用{minutes}分钟均匀泵入。求泵速，单位mL/h，写到小数点后一位。",
            "计算题：总量{volume} mL，时间{minutes}分钟，速度恒定，每小时输入多少毫升？（mL/h，一位小数）",
        ),
        en=(
            "A bag of {volume} mL is to run in evenly over {minutes} minutes. Set the pump: in mL/h, one decimal.",
            "{volume} mL of fluid must be given at a steady rate in {minutes} minutes. What is the rate? Answer in "
            "mL/h to one decimal place.",
            "Work out the pump rate (mL/h, one decimal) that delivers {volume} mL in {minutes} minutes.",
        ),
    ),
    Template(
        name="drip_rate",
        givens={"volume": ("100", "1000", "50"), "hours": ("1", "12", "1"), "factor": ("10", "20", "5")},
        solve=lambda volume, hours, factor: volume * factor / (hours * 60),
        proves=lambda answer, volume, hours, factor: answer * 60 * hours / factor == volume,
        decimals=0,
        unit=("滴/分钟", "drops/min"),
        between=(8, 130),
        zh=(
            "输液器每毫升为{factor}滴，{volume} mL液体要在{hours}小时内滴完，每分钟应滴多少滴？取整数，"
            "单位写“滴/分钟”。",
            "已知滴系数为{factor}滴/mL。要用{hours}小时输完{volume} mL，求滴速（滴/分钟，四舍五入到整数）。",
            "{volume} mL溶液计划{hours}小时输完，所用输液器{factor}滴合1 mL。请算出每分钟滴数，答案为整数，"
            "单位滴/分钟。",
        ),
        en=(
            "A giving set delivers {factor} drops per mL. {volume} mL is to run in over {hours} h. How many drops "
            "per minute? Whole number, in drops/min.",
            "Find the drip rate in drops/min, rounded to a whole number: volume {volume} mL, time {hours} h, drop "
            "factor {factor} drops/mL.",
            "{volume} mL of fluid should last {hours} h with a set of {factor} drops/mL. Give the rate as a whole "
            "number of drops/min.",
        ),
    ),
    Template(
        name="infusion_time",
        givens={"volume": ("100", "1000", "50"), "rate": ("25", "180", "5")},
        solve=lambda volume, rate: volume / rate,
        proves=lambda answer, volume, rate: answer * rate == volume,
        decimals=1,
        unit=("小时", "h"),
        between=(1, 24),
        zh=(
            "输液泵以{rate} mL/h的速度输注{volume} mL液体，需要多少小时？保留一位小数，单位写“小时”。",
            "还剩{volume} mL没有输完，泵速{rate} mL/h不变，多久能输完？用小时作答，写到一位小数。",
            "速度{rate} mL/h，总量{volume} mL。求输注时间（小时，一位小数）。",
        ),
        en=(
            "A pump runs at {rate} mL/h. How long does a bag of {volume} mL last? In h, one decimal.",
            "{volume} mL is left and the rate stays at {rate} mL/h. After how many hours is it finished? Answer in h "
            "to one decimal.",
            "Time needed to give {volume} mL at {rate} mL/h? State it in h with one decimal place.",
        ),
    ),
    Template(
        name="dilution",
        givens={"stock": ("10", "50", "5"), "target": ("1", "8", "0.5"), "final": ("100", "1000", "50")},
        solve=lambda stock, target, final: target * final / stock,
        proves=lambda answer, stock, target, final: answer * stock / final == target,
        decimals=1,
        unit=("mL", "mL"),
        between=(5, 500),
        zh=(
            "要用{stock}%的浓溶液配制{target}%的溶液{final} mL（加水至此体积），需取浓溶液多少？单位mL，"
            "保留一位小数。",
            "配液练习：原液浓度{stock}%，目标浓度{target}%，目标体积{final} mL。应量取原液多少mL？写一位小数。",
            "把{stock}%的储备液稀释成{final} mL、浓度{target}%的工作液。求所需储备液体积（mL，一位小数）。",
        ),
        en=(
            "How much of a {stock} % stock is needed to make {final} mL of a {target} % solution by adding water up "
            "to that volume? In mL, one decimal.",
            "A {stock} % concentrate is diluted to {final} mL at {target} %. Which volume of concentrate was taken? "
            "Answer in mL to one decimal.",
            "Dilution exercise: stock {stock} %, wanted {final} mL at {target} %. Volume of stock in mL, one decimal?",
        ),
    ),
    Template(
        name="weight_based",
        givens={"amount": ("0.5", "9.5", "0.5"), "weight": ("8", "90", "1")},
        solve=lambda amount, weight: amount * weight,
        proves=lambda answer, amount, weight: answer / weight == amount,
        decimals=1,
        unit=("mg", "mg"),
        between=(10, 700),
        zh=(
            "仅供算术练习：虚构物质甲按每千克体重{amount} mg计算，体重{weight} kg时合多少？单位mg，保留一位小数。",
            "练习题（物质为虚构）：规定{amount} mg/kg，对象重{weight} kg，求总量，用mg表示，写一位小数。",
            "假设某虚构试剂每千克需要{amount} mg。对{weight} kg来说一共是多少mg？保留一位小数。",
        ),
        en=(
            "For this exercise a made-up substance is reckoned at {amount} mg per kg. How much is that for {weight} "
            "kg? In mg, one decimal.",
            "Arithmetic only, the substance does not exist: {amount} mg/kg, body weight {weight} kg. Total in mg "
            "with one decimal?",
            "Suppose, for this exercise, that imaginary agent X is given as {amount} mg for every kg. State the "
            "amount for {weight} kg in mg to one decimal.",
        ),
    ),
    Template(
        name="volume_to_draw",
        givens={"amount": ("20", "400", "5"), "strength": ("4", "50", "2")},
        solve=lambda amount, strength: amount / strength,
        proves=lambda answer, amount, strength: answer * strength == amount,
        decimals=1,
        unit=("mL", "mL"),
        between=(1, 30),
        zh=(
            "练习题：虚构药液每mL含{strength} mg，需要{amount} mg，应抽取多少？单位mL，保留一位小数。",
            "某虚构溶液的浓度为{strength} mg/mL，要取出{amount} mg，对应体积是多少mL？写到一位小数。",
            "仅作算术练习：浓度{strength} mg/mL，目标量{amount} mg，求体积（mL，一位小数）。",
        ),
        en=(
            "For this exercise a made-up solution holds {strength} mg per mL. Which volume holds {amount} mg? In mL, "
            "one decimal.",
            "Arithmetic only: {amount} mg of an imaginary substance, strength {strength} mg/mL. Give the volume in "
            "mL to one decimal.",
            "An invented liquid has {strength} mg in every mL. How many mL contain {amount} mg? One decimal, unit mL.",
        ),
    ),
    Template(
        name="milligrams_to_grams",
        givens={"mass": ("50", "4950", "10")},
        solve=lambda mass: mass / 1000,
        proves=lambda answer, mass: answer * 1000 == mass,
        decimals=2,
        unit=("g", "g"),
        between=(0, 5),
        zh=(
            "{mass} mg等于多少克？答案用g，保留两位小数。",
            "把{mass}毫克换算成克，写两位小数，单位g。",
            "单位换算：{mass} mg = ？ g（两位小数）",
        ),
        en=(
            "Convert {mass} mg to grams. In g, two decimals.",
            "How many g are {mass} mg? Answer with two decimal places and the unit.",
            "{mass} mg written in g, to two decimals, is what?",
        ),
    ),
    Template(
        name="grams_to_milligrams",
        givens={"mass": ("0.025", "2.5", "0.025")},
        solve=lambda mass: mass * 1000,
        proves=lambda answer, mass: answer / 1000 == mass,
        decimals=0,
        unit=("mg", "mg"),
        between=(25, 2500),
        zh=(
            "{mass} g合多少毫克？答案为整数，单位mg。",
            "标签上写着{mass}克，换成mg是多少？写整数和单位。",
            "单位换算：{mass} g = ？ mg（整数）",
        ),
        en=(
            "Convert {mass} g to milligrams. Whole number, in mg.",
            "A label says {mass} g. What is that in mg? Give a whole number with its unit.",
            "How many mg make {mass} g? Answer in mg without decimals.",
        ),
    ),
    Template(
        name="glucose_to_mg_per_dl",
        givens={"glucose": ("2.5", "22", "0.1")},
        solve=lambda glucose: glucose * 18,
        proves=lambda answer, glucose: answer / 18 == glucose,
        decimals=0,
        unit=("mg/dL", "mg/dL"),
        between=(40, 400),
        zh=(
            "血糖{glucose} mmol/L相当于多少mg/dL？按1 mmol/L = 18 mg/dL换算，取整数。",
            "血糖换算时mmol/L乘以18得到mg/dL。某次结果为{glucose} mmol/L，请换成mg/dL，四舍五入到整数。",
            "把血糖值{glucose} mmol/L写成mg/dL（系数18，答案为整数并带单位）。",
        ),
        en=(
            "A glucose of {glucose} mmol/L is how much in mg/dL? Use 1 mmol/L = 18 mg/dL; whole number.",
            "Multiply by 18 to turn glucose in mmol/L into mg/dL. What does {glucose} mmol/L become? Round to a "
            "whole number of mg/dL.",
            "Convert a blood glucose of {glucose} mmol/L into mg/dL (factor 18, no decimals).",
        ),
    ),
    Template(
        name="glucose_to_mmol_per_l",
        givens={"glucose": ("45", "400", "1")},
        solve=lambda glucose: glucose / 18,
        proves=lambda answer, glucose: answer * 18 == glucose,
        decimals=1,
        unit=("mmol/L", "mmol/L"),
        between=(2, 23),
        zh=(
            "血糖{glucose} mg/dL换算成mmol/L是多少？按18 mg/dL = 1 mmol/L，保留一位小数。",
            "国外血糖仪显示{glucose} mg/dL。除以18即为mmol/L，请写出结果，一位小数。",
            "换算血糖单位：{glucose} mg/dL = ？ mmol/L（系数18，一位小数）",
        ),
        en=(
            "A meter shows a glucose of {glucose} mg/dL. What is that in mmol/L, with 18 mg/dL = 1 mmol/L? One "
            "decimal.",
            "Divide by 18 to turn glucose in mg/dL into mmol/L. Give {glucose} mg/dL in mmol/L to one decimal.",
            "Express a blood glucose of {glucose} mg/dL in mmol/L (factor 18, one decimal place).",
        ),
    ),
    Template(
        name="celsius_to_fahrenheit",
        givens={"temperature": ("35", "41.5", "0.1")},
        solve=lambda temperature: temperature * 9 / 5 + 32,
        proves=lambda answer, temperature: (answer - 32) * 5 / 9 == temperature,
        decimals=1,
        unit=("°F", "°F"),
        between=(90, 110),
        zh=(
            "体温{temperature} °C是多少华氏度？答案用°F，保留一位小数。",
            "把{temperature} °C换算成华氏温度，写一位小数，单位°F。",
            "体温计读数{temperature} °C，若用°F表示应写成多少（一位小数）？",
        ),
        en=(
            "A thermometer reads {temperature} °C. What is that in °F? One decimal.",
            "Convert a body temperature of {temperature} °C to °F, to one decimal.",
            "{temperature} °C equals how many degrees Fahrenheit? In °F with one decimal place.",
        ),
    ),
    Template(
        name="fahrenheit_to_celsius",
        givens={"temperature": ("95", "106", "0.1")},
        solve=lambda temperature: (temperature - 32) * 5 / 9,
        proves=lambda answer, temperature: answer * 9 / 5 + 32 == temperature,
        decimals=1,
        unit=("°C", "°C"),
        between=(35, 42),
        zh=(
            "体温{temperature} °F换成摄氏度是多少？单位°C，保留一位小数。",
            "进口体温计显示{temperature} °F，请换算为°C，写到一位小数。",
            "{temperature}华氏度等于多少摄氏度？（°C，一位小数）",
        ),
        en=(
            "A child's temperature is {temperature} °F. Give it in °C, one decimal.",
            "Convert {temperature} °F to °C and round to one decimal.",
            "What does {temperature} °F come to in degrees Celsius? Answer in °C with one decimal place.",
        ),
    ),
    Template(
        name="kilopascals_to_mmhg",
        givens={"pressure": ("4", "24", "0.1")},
        solve=lambda pressure: pressure * Fraction(15, 2),
        proves=lambda answer, pressure: answer * 2 / 15 == pressure,
        decimals=0,
        unit=("mmHg", "mmHg"),
        between=(30, 180),
        zh=(
            "按1 kPa = 7.5 mmHg计算，{pressure} kPa是多少mmHg？取整数。",
            "某压力为{pressure} kPa，乘以7.5换成mmHg，四舍五入到整数，请作答并写单位。",
            "压力换算：{pressure} kPa = ？ mmHg（1 kPa合7.5 mmHg，整数）",
        ),
        en=(
            "With 1 kPa = 7.5 mmHg, how much is {pressure} kPa in mmHg? Whole number.",
            "A gas pressure in blood is reported as {pressure} kPa. Turn it into mmHg (factor 7.5, no decimals).",
            "Convert {pressure} kPa to mmHg, taking 7.5 mmHg for each kPa; round to a whole number.",
        ),
    ),
    Template(
        name="pounds_to_kilograms",
        givens={"mass": ("15", "260", "1")},
        solve=lambda mass: mass * Fraction("0.4536"),
        proves=lambda answer, mass: answer / mass == Fraction(4536, 10000),
        decimals=1,
        unit=("kg", "kg"),
        between=(5, 120),
        zh=(
            "体重{mass}磅是多少千克？按1磅 = 0.4536 kg，答案用kg，保留一位小数。",
            "一位旅客说自己重{mass}磅（1磅合0.4536 kg），换成kg是多少？写一位小数。",
            "{mass} lb = ？ kg（1 lb = 0.4536 kg，一位小数）",
        ),
        en=(
            "Somebody weighs {mass} lb. With 1 lb = 0.4536 kg, what is that in kg? One decimal.",
            "Convert {mass} lb to kg (1 lb is 0.4536 kg), to one decimal.",
            "A scale shows {mass} lb. State the weight in kg with one decimal place; take 0.4536 kg per lb.",
        ),
    ),
    Template(
        name="body_mass_index",
        givens={"weight": ("45", "110", "0.5"), "height": ("150", "195", "1")},
        solve=lambda weight, height: weight / (height / 100) ** 2,
        proves=lambda answer, weight, height: answer * height * height == weight * 10000,
        decimals=1,
        unit=("kg/m²", "kg/m²"),
        between=(17, 40),
        zh=(
            "身高{height} cm，体重{weight} kg，求体质指数（BMI）。单位kg/m²，保留一位小数。",
            "某成年人体重{weight} kg、身高{height} cm，他的BMI是多少kg/m²？写到一位小数。",
            "请计算BMI：{weight} kg，{height} cm。（kg/m²，一位小数）",
        ),
        en=(
            "An adult is {height} cm tall and weighs {weight} kg. What is the body mass index? In kg/m², one decimal.",
            "Work out the BMI for {weight} kg and {height} cm; answer in kg/m² to one decimal.",
            "Weight {weight} kg, height {height} cm: give the BMI (kg/m², one decimal place).",
        ),
    ),
    Template(
        name="mean_arterial_pressure",
        givens={"systolic": ("110", "180", "1"), "diastolic": ("50", "85", "1")},
        solve=lambda systolic, diastolic: (systolic + 2 * diastolic) / 3,
        proves=lambda answer, systolic, diastolic: 3 * (answer - diastolic) == systolic - diastolic,
        decimals=0,
        unit=("mmHg", "mmHg"),
        between=(60, 130),
        zh=(
            "血压{systolic}/{diastolic} mmHg，按（收缩压 + 2×舒张压）÷3估算平均动脉压，取整数，单位mmHg。",
            "收缩压{systolic} mmHg，舒张压{diastolic} mmHg。平均动脉压 = 舒张压 + 脉压÷3，结果是多少mmHg（整数）？",
            "用“舒张压加三分之一脉压”计算{systolic}/{diastolic} mmHg的平均动脉压，四舍五入到整数，写mmHg。",
        ),
        en=(
            "Blood pressure is {systolic}/{diastolic} mmHg. Estimate the mean arterial pressure as (systolic + 2 × "
            "diastolic) / 3, in mmHg, whole number.",
            "Systolic {systolic} mmHg, diastolic {diastolic} mmHg: what is the mean arterial pressure if it is the "
            "diastolic plus a third of the pulse pressure? Round to whole mmHg.",
            "Give the mean arterial pressure for {systolic}/{diastolic} mmHg by diastolic + (systolic - diastolic) / "
            "3, without decimals, in mmHg.",
        ),
    ),
    Template(
        name="anion_gap",
        givens={"sodium": ("130", "150", "1"), "chloride": ("94", "112", "1"), "bicarbonate": ("8", "28", "1")},
        solve=lambda sodium, chloride, bicarbonate: sodium - (chloride + bicarbonate),
        proves=lambda answer, sodium, chloride, bicarbonate: answer + bicarbonate + chloride == sodium,
        decimals=0,
        unit=("mmol/L", "mmol/L"),
        between=(5, 30),
        zh=(
            "钠{sodium}、氯{chloride}、碳酸氢根{bicarbonate}（单位均为mmol/L），不计钾，阴离子间隙是多少？写整数，"
            "单位mmol/L。",
            "阴离子间隙 = 钠 - 氯 - 碳酸氢根。已知三者依次为{sodium}、{chloride}、{bicarbonate} mmol/L，"
            "求结果（mmol/L，整数）。",
            "血钠{sodium} mmol/L，血氯{chloride} mmol/L，碳酸氢根{bicarbonate} mmol/L。"
            "请按钠减去氯与碳酸氢根之和算阴离子间隙，用mmol/L作答。",
        ),
        en=(
            "Sodium {sodium}, chloride {chloride}, bicarbonate {bicarbonate}, all in mmol/L. What is the anion gap "
            "without potassium? Whole number, in mmol/L.",
            "Anion gap = sodium - chloride - bicarbonate. Work it out for {sodium}, {chloride} and {bicarbonate} "
            "mmol/L in that order; answer in mmol/L.",
            "Leaving potassium out, give the anion gap in mmol/L for Na {sodium}, Cl {chloride} and HCO3 "
            "{bicarbonate} mmol/L.",
        ),
    ),
    Template(
        name="corrected_calcium",
        givens={"calcium": ("1.7", "2.6", "0.01"), "albumin": ("20", "38", "1")},
        solve=lambda calcium, albumin: calcium + Fraction("0.02") * (40 - albumin),
        proves=lambda answer, calcium, albumin: (answer - calcium) * 50 + albumin == 40,
        decimals=2,
        unit=("mmol/L", "mmol/L"),
        between=(2, 3),
        zh=(
            "校正钙 = 实测钙 + 0.02×（40 - 白蛋白），钙用mmol/L，白蛋白用g/L。实测钙{calcium}，白蛋白{albumin}，"
            "校正钙是多少mmol/L？保留两位小数。",
            "总钙{calcium} mmol/L，白蛋白{albumin} g/L。白蛋白每比40 g/L低1，钙加0.02 mmol/L，求校正后的钙（mmol/L，"
            "两位小数）。",
            "按公式“钙 + 0.02×（40 - 白蛋白）”校正：钙{calcium} mmol/L，白蛋白{albumin} g/L。结果写两位小数，"
            "单位mmol/L。",
        ),
        en=(
            "Corrected calcium = measured calcium + 0.02 × (40 - albumin), calcium in mmol/L, albumin in g/L. "
            "Measured {calcium}, albumin {albumin}: corrected value in mmol/L, two decimals?",
            "Total calcium is {calcium} mmol/L and albumin {albumin} g/L. Add 0.02 mmol/L for each g/L that albumin "
            "is below 40 and give the corrected calcium in mmol/L to two decimals.",
            "Correct a calcium of {calcium} mmol/L for an albumin of {albumin} g/L by calcium + 0.02 × (40 - "
            "albumin). Two decimal places, unit mmol/L.",
        ),
    ),
    Template(
        name="creatinine_units",
        givens={"creatinine": ("40", "600", "1")},
        solve=lambda creatinine: creatinine / Fraction("88.4"),
        proves=lambda answer, creatinine: answer * 884 == creatinine * 10,
        decimals=2,
        unit=("mg/dL", "mg/dL"),
        between=(0, 7),
        zh=(
            "血肌酐{creatinine} μmol/L，按88.4 μmol/L = 1 mg/dL换算，是多少mg/dL？保留两位小数。",
            "肌酐由μmol/L除以88.4得到mg/dL。结果为{creatinine} μmol/L时，应写成多少mg/dL（两位小数）？",
            "换算肌酐单位：{creatinine} μmol/L = ？ mg/dL（除以88.4，两位小数）",
        ),
        en=(
            "A creatinine of {creatinine} µmol/L is how much in mg/dL, with 88.4 µmol/L = 1 mg/dL? Two decimals.",
            "Divide by 88.4 to turn creatinine in µmol/L into mg/dL. Give {creatinine} µmol/L in mg/dL to two "
            "decimals.",
            "Express a creatinine of {creatinine} µmol/L in mg/dL (divide by 88.4; two decimal places).",
        ),
    ),
    Template(
        name="fluid_balance",
        givens={
            **{"drunk": ("200", "1800", "50"), "infused": ("250", "2000", "250")},
            **{"urine": ("400", "2400", "50"), "lost": ("50", "600", "25")},
        },
        solve=lambda drunk, infused, urine, lost: drunk + infused - (urine + lost),
        proves=lambda answer, drunk, infused, urine, lost: lost + answer + urine - infused == drunk,
        decimals=0,
        unit=("mL", "mL"),
        between=(-900, 1500),
        zh=(
            "24小时内饮水{drunk} mL、输液{infused} mL，尿量{urine} mL、引流{lost} mL。入量减出量是多少？单位mL，"
            "若为负请写负号。",
            "记录出入量：入 = 口服{drunk} mL + 静脉{infused} mL；出 = 尿{urine} mL + 呕吐物{lost} mL。"
            "求液体平衡（入减出，mL，出多写负数）。",
            "某病人一天喝了{drunk} mL，输入{infused} mL，排尿{urine} mL，另有{lost} mL引流液。净平衡为多少mL？"
            "负平衡用负号。",
        ),
        en=(
            "In 24 h a patient drank {drunk} mL and received {infused} mL by drip; urine was {urine} mL and a drain "
            "gave {lost} mL. Fluid balance (in minus out) in mL? Use a minus sign for a deficit.",
            "Fluid chart: oral {drunk} mL, intravenous {infused} mL; urine {urine} mL, vomit {lost} mL. Give intake "
            "minus output in mL, negative if more went out.",
            "Work out the day's balance in mL, in minus out (with - if negative): drunk {drunk}, infused {infused}, "
            "urine {urine}, drain {lost}, all in mL.",
        ),
    ),
    Template(
        name="due_date",
        givens={"start": ("0", "1000", "1"), "elapsed": ("40", "270", "1")},
        solve=lambda start, elapsed: 280 - elapsed,
        proves=walk_to_due_date,
        decimals=0,
        unit=("天", "days"),
        between=(10, 240),
        show=show_dates,
        zh=(
            "末次月经第一天是{start}，预产期按其后第280天计。从{today}到预产期还有多少天？答案为整数，单位“天”。",
            "某孕妇末次月经始于{start}，以加280天为预产期。今天是{today}，距预产期几天？写整数加“天”。",
            "预产期 = 末次月经首日 + 280天。首日为{start}，问{today}时离预产期还差多少天（整数，天）？",
        ),
        en=(
            "The last period began on {start}; the due date is 280 days later. How many days are left on {today}? "
            "Whole number, in days.",
            "Count 280 days from {start}, the first day of the last period, for the due date. On {today}, how many "
            "days remain? Answer in days.",
            "First day of the last period: {start}. Today: {today}. With the due date 280 days after the first, give "
            "the days still to go, in days.",
        ),
    ),
    Template(
        name="oxygen_content",
        givens={"haemoglobin": ("7", "17", "0.5"), "saturation": ("94", "98", "1"), "pressure": ("75", "95", "5")},
        solve=lambda haemoglobin, saturation, pressure: (
            Fraction("1.34") * haemoglobin * saturation / 100 + Fraction("0.003") * pressure
        ),
        proves=lambda answer, haemoglobin, saturation, pressure: (
            (1000 * answer - 3 * pressure) * 10 == 134 * haemoglobin * saturation
        ),
        decimals=1,
        unit=("mL/dL", "mL/dL"),
        between=(8, 23),
        zh=(
            "动脉血氧含量 = 1.34×血红蛋白×饱和度 + 0.003×氧分压。血红蛋白{haemoglobin} g/dL，饱和度{saturation}%，"
            "氧分压{pressure} mmHg，求氧含量（mL/dL，一位小数）。",
            "已知Hb {haemoglobin} g/dL，SaO2 {saturation}%，PaO2 {pressure} mmHg。按1.34×Hb×SaO2 + "
            "0.003×PaO2（SaO2用小数代入）计算氧含量，单位mL/dL，保留一位小数。",
            "每克血红蛋白带氧1.34 mL，每mmHg溶解氧0.003 mL/dL。血红蛋白{haemoglobin} g/dL、饱和度{saturation}%、"
            "氧分压{pressure} mmHg时，氧含量是多少mL/dL？写一位小数。",
        ),
        en=(
            "Oxygen content = 1.34 × haemoglobin × saturation + 0.003 × oxygen pressure. For {haemoglobin} g/dL, "
            "{saturation} % and {pressure} mmHg, give it in mL/dL, one decimal.",
            "Each gram of haemoglobin carries 1.34 mL of oxygen and each mmHg dissolves 0.003 mL/dL. Haemoglobin "
            "{haemoglobin} g/dL, saturation {saturation} %, oxygen pressure {pressure} mmHg: content in mL/dL to one "
            "decimal?",
            "Compute the arterial oxygen content (mL/dL, one decimal place) by 1.34 × Hb × SaO2 + 0.003 × PaO2 with "
            "Hb {haemoglobin} g/dL, SaO2 {saturation} % (as a fraction) and PaO2 {pressure} mmHg.",
        ),
    ),
    Template(
        name="mmhg_to_kilopascals",
        givens={"pressure": ("30", "180", "1")},
        solve=lambda pressure: pressure / Fraction("7.5"),
        proves=lambda answer, pressure: answer * 15 == 2 * pressure,
        decimals=1,
        unit=("kPa", "kPa"),
        between=(4, 24),
        trained=False,
        zh=(
            "血压计读数{pressure} mmHg，按7.5 mmHg合1 kPa，等于多少kPa？一位小数。",
            "把{pressure} mmHg除以7.5换成kPa，保留一位小数。",
            "{pressure} mmHg = ？ kPa（7.5 mmHg为1 kPa，一位小数）",
        ),
        en=(
            "Turn {pressure} mmHg into kPa, with 7.5 mmHg to the kPa; one decimal.",
            "How many kPa are {pressure} mmHg if 1 kPa is 7.5 mmHg? To one decimal.",
            "Pressure {pressure} mmHg; in kPa (divide by 7.5), one decimal place?",
        ),
    ),
    Template(
        name="minute_volume",
        givens={"breaths": ("8", "32", "1"), "tidal": ("300", "700", "10")},
        solve=lambda breaths, tidal: breaths * tidal / 1000,
        proves=lambda answer, breaths, tidal: answer * 1000 / tidal == breaths,
        decimals=1,
        unit=("L/min", "L/min"),
        between=(3, 18),
        trained=False,
        zh=(
            "每分钟呼吸{breaths}次，每次潮气量{tidal} mL，每分通气量是多少L/min？保留一位小数。",
            "潮气量{tidal} mL，呼吸频率{breaths}次/分。两者相乘得每分通气量，用L/min表示，写一位小数。",
            "求每分通气量（L/min，一位小数）：频率{breaths}次/分，潮气量{tidal} mL。",
        ),
        en=(
            "Somebody breathes {breaths} times a minute with a tidal volume of {tidal} mL. Minute volume in L/min, "
            "one decimal?",
            "Tidal volume {tidal} mL, {breaths} breaths per minute: multiply for the minute volume, in L/min to one "
            "decimal.",
            "Find the minute volume (L/min, one decimal place) for {breaths} breaths of {tidal} mL each minute.",
        ),
    ),
    Template(
        name="osmolality",
        givens={"sodium": ("128", "155", "1"), "glucose": ("4", "30", "0.1"), "urea": ("3", "20", "0.1")},
        solve=lambda sodium, glucose, urea: 2 * sodium + glucose + urea,
        proves=lambda answer, sodium, glucose, urea: (answer - urea - glucose) / 2 == sodium,
        decimals=1,
        unit=("mmol/kg", "mmol/kg"),
        between=(265, 350),
        trained=False,
        zh=(
            "估算血浆渗透压 = 2×钠 + 葡萄糖 + 尿素。钠{sodium}、葡萄糖{glucose}、尿素{urea}（均为mmol/L），"
            "结果写一位小数，单位mmol/kg。",
            "钠{sodium} mmol/L，血糖{glucose} mmol/L，尿素{urea} mmol/L，用2×钠 + 血糖 + 尿素求渗透压（mmol/kg，"
            "一位小数）。",
            "两倍血钠加血糖加尿素即为估算渗透压。三项为{sodium}、{glucose}、{urea} mmol/L，答案用mmol/kg，一位小数。",
        ),
        en=(
            "Estimated plasma osmolality = 2 × sodium + glucose + urea. With {sodium}, {glucose} and {urea} mmol/L, "
            "what is it in mmol/kg, one decimal?",
            "Sodium {sodium}, glucose {glucose}, urea {urea} (mmol/L). Add twice the sodium to the other two for the "
            "osmolality in mmol/kg, one decimal.",
            "By 2 × Na + glucose + urea, find the osmolality (mmol/kg, one decimal): {sodium}, {glucose}, {urea} "
            "mmol/L.",
        ),
    ),
    Template(
        name="predictive_value",
        givens={"ill": ("20", "180", "1"), "healthy": ("10", "240", "1")},
        solve=lambda ill, healthy: 100 * ill / (ill + healthy),
        proves=lambda answer, ill, healthy: (100 - answer) * (ill + healthy) == 100 * healthy,
        decimals=1,
        unit=("%", "%"),
        between=(10, 95),
        trained=False,
        zh=(
            "筛查结果阳性的人中，{ill}人确实患病，{healthy}人并未患病。阳性预测值是百分之多少？写成%，保留一位小数。",
            "某试验真阳性{ill}例、假阳性{healthy}例，求阳性预测值，用%作答，一位小数。",
            "真阳性{ill}，假阳性{healthy}，阳性预测值 = 真阳性÷全部阳性，结果是多少%（一位小数）？",
        ),
        en=(
            "Of the people with a positive screening test, {ill} had the disease and {healthy} did not. What is the "
            "positive predictive value? In %, one decimal.",
            "True positives {ill}, false positives {healthy}: give the positive predictive value in % to one decimal.",
            "A test was rightly positive in {ill} people and wrongly positive in {healthy}. State the share of "
            "positives that are right in %, one decimal place.",
        ),
    ),
)
TEMPLATES = {template.name: template for template in KINDS_OF_SUM}


if __name__ == "__main__":
    main()
