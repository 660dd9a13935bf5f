/* The JSON door: what it refuses and says, what it accepts, typed getters, builders. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "claas/err.h"
#include "claas/json.h"
#include "claas/mem.h"
#include "claas/random.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static void assert_text_has(const char *part)
{
    if (!strstr(claas_error_text(), part))
        fail_msg("'%s' lacks '%s'", claas_error_text(), part);
}

static int parse(const char *text, size_t length)
{
    CLAAS_AUTO(claas_json_free) cJSON *json = NULL;
    /* An exact heap copy, so that the address sanitizer sees a read beyond the end. */
    CLAAS_AUTO_FREE char *copy = malloc(length ? length : 1);
    int rc;

    memcpy(copy, text, length);
    rc = claas_json_parse(copy, length, 1 << 20, &json);
    assert_true((rc == 0) == (json != NULL));
    return rc;
}

struct text_case {
    const char *text;
    size_t length;
    const char *part; /* of the error */
};

#define CASE(text, part)                                                                           \
    {                                                                                              \
        text, sizeof(text) - 1, part                                                               \
    }

static void test_json_refusals(void **state)
{
    static const struct text_case cases[] = {
        CASE("", "nothing"),
        CASE("   ", "syntax"),
        CASE("{} x", "after the end"),
        CASE("{}{}", "after the end"),
        CASE("1 2", "after the end"),
        CASE("{}\0", "outside of a string"),
        CASE("{\"a\":1}\v", "outside of a string"),
        CASE("\xEF\xBB\xBF{}", "line 1, column 1: character outside"),
        CASE("{\"a\":\"x\ny\"}", "control character"),
        CASE("{\"a\":\"x\ty\"}", "control character"),
        CASE("\"\x01\"", "control character"),
        CASE("\"\x80\"", "UTF-8"),
        CASE("\"\xC0\xAF\"", "UTF-8"),         /* overlong / */
        CASE("\"\xE0\x80\xAF\"", "UTF-8"),     /* overlong */
        CASE("\"\xF0\x80\x80\xAF\"", "UTF-8"), /* overlong */
        CASE("\"\xED\xA0\x80\"", "UTF-8"),     /* surrogate D800 */
        CASE("\"\xF4\x90\x80\x80\"", "UTF-8"), /* beyond 10FFFF */
        CASE("\"\xE2\x82\"", "UTF-8"),         /* cut */
        CASE("\"\xFF\"", "UTF-8"),
        CASE("\"a\\u0000b\"", "\\u0000"),
        CASE("\"a\\uZZZZb\"", "hexadecimal"),
        CASE("\"\\u12\"", "hexadecimal"),
        CASE("\"\\u12", "hexadecimal"),
        CASE("\"\\ud800\"", "syntax"),
        CASE("\"\\udc00\"", "syntax"),
        CASE("\"\\ud800\\u0041\"", "syntax"),
        CASE("\"\\x\"", "syntax"),
        CASE("\"abc", "without an end"),
        CASE("\"abc\\", "without an end"),
        CASE("\"abc\\\"", "without an end"),
        CASE("{\"a\":1,\"b\":2,\"a\":3}", "'a' appears twice"),
        CASE("[{\"x\":{\"k\":1,\"\\u006b\":2}}]", "'k' appears twice"),
        CASE("{\"a\":1,\"b\":2,\"c\":3,\"d\":4,\"e\":5,\"f\":6,\"g\":7,\"h\":8,\"i\":9,\"d\":0}",
             "'d' appears twice"),
        CASE("01", "malformed number"),
        CASE("-", "malformed number"),
        CASE("1.", "malformed number"),
        CASE("[1.e5]", "malformed number"),
        CASE("1e", "malformed number"),
        CASE("1e+", "malformed number"),
        CASE("-01", "malformed number"),
        CASE(".5", "syntax"),
        CASE("+1", "syntax"),
        CASE("1e400", "out of range"),
        CASE("[-1e999]", "column 2: number out of range"),
        CASE("NaN", "syntax"),
        CASE("Infinity", "syntax"),
        CASE("-Infinity", "malformed number"),
        CASE("nul", "syntax"),
        CASE("True", "syntax"),
        CASE("{a:1}", "syntax"),
        CASE("{'a':1}", "syntax"),
        CASE("[1,]", "syntax"),
        CASE("{\"a\":1,}", "syntax"),
        CASE("[1,,2]", "syntax"),
        CASE("[1", "syntax"),
        CASE("[1}", "syntax"),
        CASE("]", "syntax"),
        CASE("// c\n1", "syntax"),
        CASE("{\n \"\xC3\xA4\": 01}", "line 2, column 7: malformed number"),
        CASE("1234567890123456789012345678901234567890123456789012345678901234", "too many"),
    };

    for (size_t i = 0; i < CLAAS_COUNT(cases); i++) {
        int rc = parse(cases[i].text, cases[i].length);

        if (rc != CLAAS_ERR_FORMAT)
            fail_msg("case %zu '%s' gave %d", i, cases[i].text, rc);
        if (!strstr(claas_error_text(), cases[i].part))
            fail_msg("case %zu '%s': '%s'", i, cases[i].text, claas_error_text());
        assert_true(claas_utf8_valid(claas_error_text(), strlen(claas_error_text())));
    }
}

static void test_json_accepts(void **state)
{
    static const struct text_case cases[] = {
        CASE("{}", ""),
        CASE(" \t\r\n[ ] \n", ""),
        CASE("null", ""),
        CASE("true", ""),
        CASE("0", ""),
        CASE("-0", ""),
        CASE("-0.5e-7", ""),
        CASE("12E+3", ""),
        CASE("\"\"", ""),
        CASE("\"\\\"\\\\\\/\\b\\f\\n\\r\\t\\u00e4\\ud83d\\ude00\"", ""),
        CASE("\"\\\\u0000\"", ""), /* an escaped backslash, then letters */
        CASE("\"\x7F\xC3\xA4\xE2\x82\xAC\xF0\x9F\x98\x80\"", ""),
        CASE("{\"a\":{\"a\":1},\"A\":2}", ""),
        CASE("\"[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[\"", ""),
        CASE("1.7976931348623157e308", ""),
    };

    for (size_t i = 0; i < CLAAS_COUNT(cases); i++)
        if (parse(cases[i].text, cases[i].length) != 0)
            fail_msg("'%s': %s", cases[i].text, claas_error_text());
}

static void test_json_limits(void **state)
{
    CLAAS_AUTO(claas_json_free) cJSON *json = NULL;
    char text[2 * (CLAAS_JSON_DEPTH_MAX + 1)];

    for (int depth = CLAAS_JSON_DEPTH_MAX; depth <= CLAAS_JSON_DEPTH_MAX + 1; depth++) {
        memset(text, '[', (size_t)depth);
        memset(text + depth, ']', (size_t)depth);
        assert_int_equal(parse(text, 2 * (size_t)depth),
                         depth > CLAAS_JSON_DEPTH_MAX ? CLAAS_ERR_FORMAT : 0);
    }
    assert_text_has("nested too deeply");
    assert_int_equal(claas_json_parse("[1,2]", 5, 4, &json), CLAAS_ERR_TOO_LARGE);
    assert_null(json);
    assert_int_equal(claas_json_parse("[1,2]", 5, 5, &json), 0);
}

/* Our own actors' texts are bounded by their length alone. */
static void test_json_values(void **state)
{
    size_t length =
        2 * (size_t)CLAAS_JSON_VALUES_MAX + 1; /* [0,0,…,0]: as many zeros and the list */
    CLAAS_AUTO_FREE char *text = claas_alloc(length + 1, 1);
    CLAAS_AUTO(claas_json_free) cJSON *json = NULL;

    (void)state;
    assert_non_null(text);
    for (size_t i = 0; i < length; i++)
        text[i] = i % 2 ? '0' : ',';
    text[0] = '[';
    text[length - 1] = ']';
    assert_int_equal(claas_json_parse(text, length, length, &json), 0);
    claas_json_free(&json);
    memmove(text + 3, text + 2, length++ - 2); /* [[],0,…]: one more */
    memcpy(text + 1, "[]", 2);
    assert_int_equal(claas_json_parse(text, length, length, &json), CLAAS_ERR_FORMAT);
    assert_int_equal(claas_json_parse_own(text, length, length, &json), 0);
    assert_int_equal(claas_json_parse_own(text, length, length - 1, &json), CLAAS_ERR_TOO_LARGE);
}

/* Every cut of a valid text is refused, except where what is left is whole. */
static void test_json_truncations(void **state)
{
    static const char text[] = "{\"model\":\"a/b\",\"n\":[1,-2.5e3,null,true],\"o\":{\"\\u00e4\":"
                               "\"\xE2\x82\xAC\"}}";

    for (size_t length = 0; length < sizeof(text) - 1; length++)
        assert_int_equal(parse(text, length), CLAAS_ERR_FORMAT);
    assert_int_equal(parse(text, sizeof(text) - 1), 0);
}

static void test_json_getters(void **state)
{
    static const char text[] =
        "{\"model\":\"m\",\"Model\":\"M\",\"n\":5,\"half\":0.5,\"yes\":true,\"none\":null,"
        "\"list\":[1],\"map\":{\"k\":1},\"big\":9007199254740992,\"bigger\":9007199254740994,"
        "\"huge\":1e300,\"exact\":8.03,\"text_big\":\"9223372036854775807\",\"text_small\":\"5\","
        "\"text_bad\":\"9223372036854775808\",\"text_x\":\"90071992547409931x\"}";
    CLAAS_AUTO(claas_json_free) cJSON *json = NULL;
    const char *string = "default";
    const cJSON *item = NULL;
    int64_t number = -7;
    double real = -7;
    bool flag = false;

    assert_int_equal(claas_json_parse(text, strlen(text), 4096, &json), 0);
    assert_int_equal(claas_json_get_string(json, "model", &string), 1);
    assert_string_equal(string, "m");
    assert_int_equal(claas_json_get_string(json, "Model", &string), 1);
    assert_string_equal(string, "M");
    string = "default";
    assert_int_equal(claas_json_get_string(json, "MODEL", &string), 0);
    assert_int_equal(claas_json_get_string(json, "none", &string), 0);
    assert_string_equal(string, "default");
    assert_int_equal(claas_json_get_string(json, "n", &string), CLAAS_ERR_INVALID);
    assert_text_has("'n' must be a string");
    assert_string_equal(string, "default");
    assert_int_equal(claas_json_get_int(json, "N", 0, 9, &number), 0);
    assert_int_equal(claas_json_get_int(json, "n", 6, 9, &number), CLAAS_ERR_INVALID);
    assert_text_has("'n' is 5, it must be from 6 to 9");
    assert_int_equal(claas_json_get_int(json, "half", 0, 9, &number), CLAAS_ERR_INVALID);
    assert_int_equal(claas_json_get_int(json, "yes", 0, 9, &number), CLAAS_ERR_INVALID);
    assert_int_equal(claas_json_get_int(json, "bigger", INT64_MIN, INT64_MAX, &number),
                     CLAAS_ERR_INVALID);
    assert_text_has("2^53");
    assert_int_equal(claas_json_get_int(json, "huge", INT64_MIN, INT64_MAX, &number),
                     CLAAS_ERR_INVALID);
    assert_int_equal(claas_json_get_int(json, "text_small", 0, 9, &number), CLAAS_ERR_INVALID);
    assert_int_equal(claas_json_get_int(json, "text_bad", 0, INT64_MAX, &number),
                     CLAAS_ERR_INVALID);
    assert_int_equal(claas_json_get_int(json, "text_x", 0, INT64_MAX, &number), CLAAS_ERR_INVALID);
    assert_true(number == -7);
    assert_int_equal(claas_json_get_int(json, "big", 0, INT64_MAX, &number), 1);
    assert_true(number == INT64_C(9007199254740992));
    assert_int_equal(claas_json_get_int(json, "text_big", 0, INT64_MAX, &number), 1);
    assert_true(number == INT64_MAX);
    assert_int_equal(claas_json_get_number(json, "half", 0, 1, &real), 1);
    assert_true(real == 0.5);
    assert_int_equal(claas_json_get_number(json, "n", 0, 1, &real), CLAAS_ERR_INVALID);
    assert_int_equal(claas_json_get_number(json, "exact", 0.1, 8.02, &real), CLAAS_ERR_INVALID);
    assert_text_has("'exact' is 8.03, it must be from 0.1 to 8.02");
    assert_int_equal(claas_json_get_number(json, "model", 0, 1, &real), CLAAS_ERR_INVALID);
    assert_int_equal(claas_json_get_bool(json, "yes", &flag), 1);
    assert_true(flag);
    assert_int_equal(claas_json_get_bool(json, "n", &flag), CLAAS_ERR_INVALID);
    assert_int_equal(claas_json_get_array(json, "list", &item), 1);
    assert_int_equal(claas_json_get_array(json, "map", &item), CLAAS_ERR_INVALID);
    assert_int_equal(claas_json_get_object(json, "map", &item), 1);
    assert_int_equal(claas_json_get_object(json, "list", &item), CLAAS_ERR_INVALID);
    assert_null(claas_json_get(json, "none"));
    assert_null(claas_json_get(NULL, "a"));
    assert_null(claas_json_get(claas_json_get(json, "list"), "a"));
}

static void test_json_builders(void **state)
{
    CLAAS_AUTO(claas_json_free) cJSON *json = cJSON_CreateObject();
    CLAAS_AUTO(claas_json_free) cJSON *again = NULL;
    CLAAS_AUTO_FREE char *text = NULL;
    int64_t number = 0;

    claas_json_set_string(json, "s", "a\"\n\xFF\xED\xA0\x80z");
    claas_json_set_string(json, "nil", NULL);
    claas_json_set_int(json, "i", INT64_C(9007199254740992));
    claas_json_set_int(json, "min", INT64_MIN);
    claas_json_set_number(json, "x", 0.1);
    claas_json_set_number(json, "nan", NAN);
    claas_json_set_bool(json, "b", true);
    claas_json_set_null(json, "n");
    claas_json_set_int(claas_json_set(json, "o", cJSON_CreateObject()), "k", 1);
    claas_json_set_bool(json, "b", false); /* set again: replaced, not doubled */
    text = claas_json_print(json);
    assert_string_equal(text,
                        "{\"s\":\"a\\\"\\n\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBDz\","
                        "\"nil\":null,\"i\":9007199254740992,"
                        "\"min\":\"-9223372036854775808\",\"x\":0.1,\"nan\":null,"
                        "\"b\":false,\"n\":null,\"o\":{\"k\":1}}");
    assert_int_equal(claas_json_parse(text, strlen(text), 4096, &again), 0);
    assert_int_equal(claas_json_get_int(again, "min", INT64_MIN, INT64_MAX, &number), 1);
    assert_true(number == INT64_MIN);
    assert_int_equal(claas_json_get_int(again, "i", INT64_MIN, INT64_MAX, &number), 1);
    assert_true(number == INT64_C(9007199254740992));
    /* The same answers from the tree that was built. */
    assert_int_equal(claas_json_get_int(json, "i", INT64_MIN, INT64_MAX, &number), 1);
    assert_true(number == INT64_C(9007199254740992));
    claas_json_set_int(NULL, "k", 1);
    claas_json_set_string(NULL, "k", "v");
    assert_null(claas_json_set(NULL, "k", cJSON_CreateObject()));
    assert_null(claas_json_print(NULL));
    /* A member that could not be made spoils the tree. */
    assert_null(claas_json_set(json, "lost", NULL));
    assert_null(claas_json_print(json));
}

static void test_utf8(void **state)
{
    assert_true(claas_utf8_valid("", 0));
    assert_true(claas_utf8_valid(NULL, 0));
    assert_true(claas_utf8_valid("\xF4\x8F\xBF\xBF", 4));
    assert_false(claas_utf8_valid("a\0b", 3));
    assert_false(claas_utf8_valid("\xC0\x80", 2));
    assert_false(claas_utf8_valid("\xED\xBF\xBF", 3));
    assert_false(claas_utf8_valid("\xE2\x82", 2));
}

/* Changed bytes: never a crash, and whatever is accepted prints to a text that is accepted again.
 */
static void test_json_mutations(void **state)
{
    static const char text[] = "{\"a\":[1,-2.5e3,null,true,{\"b\":\"x\\u00e4\\n\"}],\"c\":"
                               "\"\xE2\x82\xAC\",\"d\":{\"e\":0.1}}";
    int accepted = 0;

    for (uint64_t i = 0; i < 20000; i++) {
        CLAAS_AUTO(claas_json_free) cJSON *json = NULL;
        CLAAS_AUTO_FREE char *copy = claas_strndup(text, sizeof(text) - 1);
        CLAAS_AUTO_FREE char *printed = NULL;
        uint32_t words[4];

        claas_philox(1, 2, i, words);
        copy[words[0] % (sizeof(text) - 1)] = (char)(words[3] & 64 ? words[1] : 32 + words[1] % 95);
        if (words[2] % 4 == 0)
            copy[words[2] / 4 % (sizeof(text) - 1)] = "\"\\{}[],:0u"[words[3] % 10];
        if (claas_json_parse(copy, sizeof(text) - 1, 4096, &json) < 0)
            continue;
        accepted++;
        printed = claas_json_print(json);
        assert_non_null(printed);
        if (parse(printed, strlen(printed)) != 0)
            fail_msg("'%s' became '%s': %s", copy, printed, claas_error_text());
    }
    print_message("%d of 20000 accepted\n", accepted);
    assert_true(accepted > 1000);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_json_refusals),    cmocka_unit_test(test_json_accepts),
        cmocka_unit_test(test_json_limits),      cmocka_unit_test(test_json_values),
        cmocka_unit_test(test_json_truncations), cmocka_unit_test(test_json_getters),
        cmocka_unit_test(test_json_builders),    cmocka_unit_test(test_utf8),
        cmocka_unit_test(test_json_mutations),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
