"""What is taken for personal data and what is not. Every number here was made up by hand and belongs to nobody: phone
numbers of zeros or of films, births on the first day of 1900, the examples of standards and of payment providers.
"""

import json
import time
from pathlib import Path

import pytest

from stagekit.files import find_files, read_records
from stagekit.personal_data import (
    BANK_CARD,
    EMAIL,
    ID_CARD,
    MOBILE,
    TELEPHONE,
    find_personal_data,
    is_bank_card,
    is_id_card,
    passes_luhn,
)

DATA = Path(__file__).resolve().parents[1] / "data"


def kinds(text):
    return [item.kind for item in find_personal_data(text)]


# -- check digits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "digits",
    [
        "11010519491231002X",  # the example of GB 11643-1999: the weighted sum is 167, 167 mod 11 = 2, which is X
        # 1*7 + 1*9 + 1*5 + 1*4 + 1*2 + 9*1 + 1*9 + 1*5 + 1*2 = 52, 52 mod 11 = 8, which is 4
        "110101190001010014",
        # 4*7 + 4*9 + 1*5 + 1*2 + 9*1 + 1*9 + 1*5 = 94, 94 mod 11 = 6, which is 6
        "440100190001010006",
    ],
)
def test_an_identity_number_is_known_by_its_check_digit(digits):
    assert is_id_card(digits) and is_id_card(digits.lower())
    others = [f"{digits[:-1]}{check}" for check in "0123456789X" if check != digits[-1]]
    assert not any(map(is_id_card, others))


@pytest.mark.parametrize(
    "digits",
    [
        # the check digits are right
        "110101190002300013",  # 30 February: 7 + 9 + 5 + 4 + 2 + 9 + 18 + 30 + 2 = 86, 86 mod 11 = 9, which is 3
        "110101209901010017",  # the future: 7 + 9 + 5 + 4 + 4 + 54 + 27 + 9 + 5 + 2 = 126, 126 mod 11 = 5, which is 7
        "990101190001010018",  # no such province: 63 + 81 + 5 + 4 + 2 + 9 + 9 + 5 + 2 = 180, 180 mod 11 = 4, so 8
        "11010119000101001",  # 17 digits
    ],
)
def test_what_cannot_be_a_person_is_no_identity_number(digits):
    assert not is_id_card(digits)


@pytest.mark.parametrize(
    ("digits", "right"),
    [
        ("79927398713", True),  # doubled from the right: 7 + 2 + 7 + 6 + 9 + 6 + 7 + 4 + 9 + 9 + 4 = 70
        ("79927398710", False),
        ("6200000000000005", True),  # 6 doubled is 12, 1 + 2 = 3; 3 + 2 + 5 = 10
        ("6200000000000050", False),  # two digits changed places
        ("0", True),
    ],
)
def test_luhn(digits, right):
    assert passes_luhn(digits) is right


@pytest.mark.parametrize(
    "digits",
    # The numbers payment providers publish for trials.
    ["4111111111111111", "5555555555554444", "2223003122003222", "378282246310005", "3566002020360505"]
    # 6 + 2 + 2 + (8 doubled: 7) + 4 + (8 doubled: 7) + ... of 19 digits: 6 + 4 + 2 + 7 + 4 + 7 = 30
    + ["6200000000000005", "6228480000000000000"],
)
def test_a_card_is_known_by_prefix_length_and_check_digit(digits):
    assert is_bank_card(digits)
    assert not is_bank_card(digits[:-1] + str((int(digits[-1]) + 1) % 10))
    assert not is_bank_card("8" + digits[1:]) and not is_bank_card(digits[:-4])


# -- what is found ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("电话13800001234。", MOBILE),
        ("电话：138 0000 1234", MOBILE),
        ("手机138-0000-1234，晚上打", MOBILE),
        ("+86 138 0000 1234", MOBILE),
        ("8613800001234", MOBILE),
        ("微信同号１３８００００１２３４", MOBILE),
        ("Call 13800001234.", MOBILE),
        ("身份证11010519491231002X，请核对", ID_CARD),
        ("身份证号码：110101 19000101 0014", ID_CARD),
        ("write to jane.doe@clinic.cn please", EMAIL),
        ("邮箱zhang_3@mail.hospital.com.cn，谢谢", EMAIL),
        ("ａｂｃ＠clinic.cn", EMAIL),
        ("phone +49 30 901820", TELEPHONE),
        ("phone +1 (555) 234-5678", TELEPHONE),
        ("+44 20 7946 0958", TELEPHONE),
        ("call (555) 234-5678 after six", TELEPHONE),
        ("call 555-234-5678", TELEPHONE),
        ("call +49 30 901820 - 5 lines", TELEPHONE),
        ("电话-13800001234", MOBILE),
        ("tel=13800001234", MOBILE),
        ("1. 13800001234", MOBILE),
        ("- 13800001234", MOBILE),
        ("座机010-65520000", TELEPHONE),
        ("（0755）86520000", TELEPHONE),
        ("卡号6200 0000 0000 0005", BANK_CARD),
        ("card 4111-1111-1111-1111", BANK_CARD),
        ("卡6228480000000000000，开户行", BANK_CARD),
        ("3782 822463 10005", BANK_CARD),
    ],
)
def test_personal_data_is_found(text, kind):
    assert kinds(text) == [kind]


@pytest.mark.parametrize(
    "text",
    [
        # doses, laboratory values, amounts
        "每次500毫克，一日3次，共12345678901单位",
        "take 0.5-1 g every 4-6 hours, at most 4000 mg in 24 hours",
        "血小板 150×10^9/L，白细胞 6.5，肌酐 13800001234 μmol/L",
        "病毒载量 13800001234 copies/mL",
        "共13800001234元",
        "预算 13800000000",
        "13800001234 mg",
        # dates, times, ranges
        "2019-12-31 08:30, 20190101-20191231, 1949年10月1日",
        "1609459200, 1609459200000",
        "2020.01.01-2020.12.31",
        # DOIs, web addresses, numbers of papers, books and trials
        "doi:10.1016/j.jad.13800001234.2018",
        "https://doi.org/10.1000/13800001234",
        "https://x.cn/?id=13800001234&card=6200000000000005",
        "PMID: 13800001234, PMC7012345, ISBN 978-7-117-00000-5, ISSN 0028-0836",
        "NCT01234567, ChiCTR1900012345, ISRCTN13800001234",
        # registration numbers, codes
        "国药准字H20123456",
        "国药准字Z138000012345",
        "国械注准20153401234",
        "批准文号：13800001234",
        "批号13800001234",
        "条形码 6901234567892",
        "CAS 50-78-2, NDC 0777-3105-02",
        "E11.9, I10, SNOMED 900000000000207008",
        "order H-13800001234",
        # versions, lengths, lists
        "version 10.15.7.13800001234",
        "3.13800001234",
        "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19",
        "138000012345",  # a digit too many
        "1380000123",  # one too few
        "12800001234",  # no operator has 128
        # check digits that do not hold
        "110105194912310021",
        "6200000000000004",
        # signs of optometry and chemistry, coordinates
        "OD +2.50 -1.25x180, OS +12.00",
        "Na+ 140 138 141 142, CD4+200 350",
        "+39.9042 116.4074",
        "+10 000 000",
        # sums
        "84834150134 - 6778576 = -16666579378",
        "5 + 13800001234 = 13800001239",
        "472547338\n+490397912423\n-------",
        "472547338\n+960397912423686",
        "(-13800001234)",
        "+960397912423686",
        # short and free numbers
        "拨打120或110，热线400-810-1234",
        # what has an @ and is no address
        "logo@2x.png, git@github.com, @someone, user@host, a@b, a@b.com",
        "jane@example.com, x@clinic.test",
    ],
)
def test_what_only_looks_like_it_is_passed_over(text):
    assert kinds(text) == []


def test_several_are_found_in_order_and_none_twice():
    text = "王某，13800001234，身份证11010519491231002X，13800001234@clinic.cn，卡6200000000000005，+86 13900005678"
    found = find_personal_data(text)
    assert [item.kind for item in found] == [MOBILE, ID_CARD, EMAIL, BANK_CARD, MOBILE]
    assert [text[item.start] for item in found] == ["1", "1", "1", "6", "+"]


def test_what_is_shown_is_masked():
    masked = [item.masked for item in find_personal_data("13800001234 11010519491231002X jane.doe@clinic.cn")]
    assert masked == ["138******34", "110*************2X", "j***@c***.cn"]
    assert find_personal_data("138-0000-1234")[0].masked == "138-****-**34"
    assert find_personal_data("+49 (30) 901820")[0].masked == "+49 (3*) ****20"


def test_a_long_text_without_breaks_costs_no_more_than_its_length():
    for text in ("a" * 500_000 + "@", "1" * 500_000, "a.b-" * 125_000, "1 2-3 " * 80_000, "13800001234 " * 10_000):
        started = time.process_time()
        find_personal_data(text)
        assert time.process_time() - started < 5


def test_nothing_is_found_in_the_shipped_data():
    for path in find_files(str(DATA)):
        for record, line in read_records(path):
            assert kinds(json.dumps(record, ensure_ascii=False)) == [], f"{path}:{line}"
