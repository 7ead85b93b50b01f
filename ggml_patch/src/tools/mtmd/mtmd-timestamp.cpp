#include "mtmd-timestamp.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdio>

// Outlines of Roboto Regular 2.138 (https://github.com/googlefonts/roboto, Copyright 2011 Google Inc., licensed under the
// Apache License, Version 2.0, http://www.apache.org/licenses/LICENSE-2.0): the characters that a time is written with.
// A point begins a contour (M), ends a line (L), or is the control point of a curve that ends at the next point (C).

// other libraries of the program have a `segment` too, and would share the vectors of it
namespace {

enum point_kind { M, L, C };

struct glyph_point {
    int        x;
    int        y;
    point_kind kind;
};

struct glyph {
    char                     c;
    int                      advance;
    std::vector<glyph_point> points;
};

constexpr float FONT_UNITS  = 2048;
constexpr float FONT_ASCENT = 1900;

// clang-format off
const std::vector<glyph> GLYPHS = {
    // 0
    {'0', 1151, {
        {1035, 622, M}, {1035, 264, C}, {911, 122, L}, {788, -20, C}, {576, -20, L}, {370, -20, C}, {244, 118, L},
        {119, 256, C}, {115, 599, L}, {115, 844, L}, {115, 1201, C}, {240, 1338, L}, {365, 1476, C}, {574, 1476, L},
        {783, 1476, C}, {907, 1342, L}, {1031, 1209, C}, {1035, 867, L}, {849, 875, M}, {849, 1121, C},
        {779, 1223, L}, {709, 1325, C}, {574, 1325, L}, {444, 1325, C}, {373, 1226, L}, {303, 1127, C},
        {301, 889, L}, {301, 592, L}, {301, 348, C}, {372, 240, L}, {444, 132, C}, {576, 132, L}, {711, 132, C},
        {779, 238, L}, {848, 345, C}, {849, 584, L},
    }},
    // 1
    {'1', 1151, {
        {729, 1464, M}, {729, 0, L}, {544, 0, L}, {544, 1233, L}, {171, 1097, L}, {171, 1264, L}, {700, 1464, L},
    }},
    // 2
    {'2', 1151, {
        {1075, 152, M}, {1075, 0, L}, {122, 0, L}, {122, 133, L}, {616, 683, L}, {738, 821, C}, {780, 902, L},
        {823, 983, C}, {823, 1065, L}, {823, 1172, C}, {756, 1248, L}, {690, 1324, C}, {569, 1324, L},
        {423, 1324, C}, {351, 1241, L}, {279, 1158, C}, {279, 1028, L}, {94, 1028, L}, {94, 1212, C},
        {215, 1344, L}, {336, 1476, C}, {569, 1476, L}, {775, 1476, C}, {891, 1369, L}, {1008, 1262, C},
        {1008, 1087, L}, {1008, 959, C}, {929, 829, L}, {850, 700, C}, {735, 575, L}, {345, 152, L},
    }},
    // 3
    {'3', 1151, {
        {391, 667, M}, {391, 819, L}, {527, 819, L}, {670, 820, C}, {740, 891, L}, {810, 962, C}, {810, 1068, L},
        {810, 1324, C}, {556, 1324, L}, {438, 1324, C}, {365, 1256, L}, {292, 1189, C}, {292, 1075, L},
        {107, 1075, L}, {107, 1242, C}, {230, 1359, L}, {354, 1476, C}, {556, 1476, L}, {753, 1476, C},
        {874, 1371, L}, {996, 1267, C}, {996, 1064, L}, {996, 983, C}, {941, 891, L}, {887, 799, C}, {767, 748, L},
        {912, 701, C}, {965, 603, L}, {1018, 505, C}, {1018, 406, L}, {1018, 202, C}, {886, 91, L}, {754, -20, C},
        {557, -20, L}, {367, -20, C}, {231, 85, L}, {95, 191, C}, {95, 385, L}, {280, 385, L}, {280, 270, C},
        {354, 201, L}, {429, 132, C}, {557, 132, L}, {684, 132, C}, {758, 199, L}, {832, 266, C}, {832, 402, L},
        {832, 538, C}, {748, 602, L}, {664, 667, C}, {523, 667, L},
    }},
    // 4
    {'4', 1151, {
        {53, 447, M}, {705, 1456, L}, {902, 1456, L}, {902, 490, L}, {1105, 490, L}, {1105, 338, L}, {902, 338, L},
        {902, 0, L}, {717, 0, L}, {717, 338, L}, {53, 338, L}, {263, 490, M}, {717, 490, L}, {717, 1205, L},
        {694, 1164, L},
    }},
    // 5
    {'5', 1151, {
        {355, 693, M}, {207, 731, L}, {280, 1456, L}, {1027, 1456, L}, {1027, 1285, L}, {437, 1285, L},
        {393, 889, L}, {503, 952, C}, {636, 952, L}, {837, 952, C}, {953, 819, L}, {1070, 687, C}, {1070, 464, L},
        {1070, 255, C}, {956, 117, L}, {842, -20, C}, {609, -20, L}, {432, -20, C}, {303, 79, L}, {174, 179, C},
        {154, 383, L}, {330, 383, L}, {365, 132, C}, {609, 132, L}, {740, 132, C}, {812, 221, L}, {884, 310, C},
        {884, 462, L}, {884, 599, C}, {808, 692, L}, {733, 786, C}, {593, 786, L}, {500, 786, C}, {452, 761, L},
        {404, 736, C}, {355, 693, L},
    }},
    // 6
    {'6', 1151, {
        {1053, 475, M}, {1053, 268, C}, {937, 124, L}, {822, -20, C}, {601, -20, L}, {444, -20, C}, {340, 63, L},
        {236, 147, C}, {184, 275, L}, {133, 404, C}, {133, 539, L}, {133, 626, L}, {133, 831, C}, {190, 1022, L},
        {248, 1213, C}, {399, 1335, L}, {550, 1458, C}, {831, 1458, L}, {847, 1458, L}, {847, 1301, L},
        {653, 1301, C}, {545, 1233, L}, {438, 1165, C}, {385, 1056, L}, {333, 948, C}, {322, 824, L}, {438, 955, C},
        {635, 955, L}, {780, 955, C}, {872, 885, L}, {965, 815, C}, {1009, 704, L}, {1053, 594, C}, {1053, 475, L},
        {319, 533, M}, {319, 339, C}, {405, 236, L}, {492, 133, C}, {601, 133, L}, {729, 133, C}, {799, 226, L},
        {870, 320, C}, {870, 466, L}, {870, 596, C}, {805, 699, L}, {740, 802, C}, {605, 802, L}, {508, 802, C},
        {429, 744, L}, {350, 686, C}, {319, 603, L},
    }},
    // 7
    {'7', 1151, {
        {1062, 1456, M}, {1062, 1352, L}, {459, 0, L}, {264, 0, L}, {866, 1304, L}, {78, 1304, L}, {78, 1456, L},
    }},
    // 8
    {'8', 1151, {
        {1038, 394, M}, {1038, 194, C}, {904, 87, L}, {771, -20, C}, {575, -20, L}, {379, -20, C}, {245, 87, L},
        {112, 194, C}, {112, 394, L}, {112, 516, C}, {177, 609, L}, {243, 703, C}, {355, 751, L}, {258, 798, C},
        {201, 884, L}, {145, 970, C}, {145, 1077, L}, {145, 1268, C}, {266, 1372, L}, {388, 1476, C},
        {574, 1476, L}, {761, 1476, C}, {882, 1372, L}, {1004, 1268, C}, {1004, 1077, L}, {1004, 969, C},
        {946, 883, L}, {888, 798, C}, {791, 751, L}, {904, 703, C}, {971, 609, L}, {1038, 515, C}, {1038, 394, L},
        {819, 1074, M}, {819, 1183, C}, {751, 1253, L}, {683, 1324, C}, {574, 1324, L}, {465, 1324, C},
        {398, 1256, L}, {331, 1189, C}, {331, 1074, L}, {331, 961, C}, {398, 893, L}, {465, 825, C}, {575, 825, L},
        {684, 825, C}, {751, 893, L}, {819, 961, C}, {819, 1074, L}, {852, 398, M}, {852, 520, C}, {774, 597, L},
        {697, 674, C}, {573, 674, L}, {446, 674, C}, {371, 597, L}, {297, 520, C}, {297, 398, L}, {297, 272, C},
        {371, 202, L}, {446, 132, C}, {575, 132, L}, {704, 132, C}, {778, 202, L}, {852, 272, C}, {852, 398, L},
    }},
    // 9
    {'9', 1151, {
        {1016, 820, M}, {1016, 678, C}, {991, 533, L}, {967, 389, C}, {896, 267, L}, {826, 146, C}, {688, 72, L},
        {551, -2, C}, {305, -2, L}, {305, 155, L}, {526, 155, C}, {633, 224, L}, {741, 293, C}, {783, 404, L},
        {826, 516, C}, {831, 642, L}, {773, 573, C}, {692, 530, L}, {611, 487, C}, {516, 487, L}, {372, 487, C},
        {280, 559, L}, {188, 631, C}, {144, 742, L}, {100, 854, C}, {100, 973, L}, {100, 1181, C}, {214, 1328, L},
        {329, 1476, C}, {552, 1476, L}, {718, 1476, C}, {820, 1390, L}, {923, 1304, C}, {969, 1169, L},
        {1016, 1034, C}, {1016, 887, L}, {282, 983, M}, {282, 853, C}, {347, 747, L}, {413, 641, C}, {546, 641, L},
        {641, 641, C}, {718, 698, L}, {796, 755, C}, {832, 839, L}, {832, 912, L}, {832, 1111, C}, {747, 1217, L},
        {663, 1323, C}, {552, 1323, L}, {423, 1323, C}, {352, 1225, L}, {282, 1128, C}, {282, 983, L},
    }},
    // :
    {':', 496, {
        {133, 98, M}, {133, 145, C}, {162, 177, L}, {192, 210, C}, {248, 210, L}, {304, 210, C}, {333, 177, L},
        {363, 145, C}, {363, 98, L}, {363, 52, C}, {333, 20, L}, {304, -12, C}, {248, -12, L}, {192, -12, C},
        {162, 20, L}, {133, 52, C}, {133, 98, L}, {134, 981, M}, {134, 1028, C}, {163, 1060, L}, {193, 1093, C},
        {249, 1093, L}, {305, 1093, C}, {334, 1060, L}, {364, 1028, C}, {364, 981, L}, {364, 935, C}, {334, 903, L},
        {305, 871, C}, {249, 871, L}, {193, 871, C}, {163, 903, L}, {134, 935, C}, {134, 981, L},
    }},
    // .
    {'.', 540, {
        {144, 98, M}, {144, 145, C}, {173, 177, L}, {203, 210, C}, {259, 210, L}, {315, 210, C}, {344, 177, L},
        {374, 145, C}, {374, 98, L}, {374, 52, C}, {344, 20, L}, {315, -12, C}, {259, -12, L}, {203, -12, C},
        {173, 20, L}, {144, 52, C}, {144, 98, L},
    }},
    // t
    {'t', 670, {
        {599, 0, M}, {536, -20, C}, {456, -20, L}, {353, -20, C}, {280, 43, L}, {207, 106, C}, {207, 269, L},
        {207, 940, L}, {9, 940, L}, {9, 1082, L}, {207, 1082, L}, {207, 1345, L}, {392, 1345, L}, {392, 1082, L},
        {594, 1082, L}, {594, 940, L}, {392, 940, L}, {392, 268, L}, {392, 185, C}, {428, 162, L}, {464, 139, C},
        {511, 139, L}, {546, 139, C}, {598, 151, L},
    }},
    // i
    {'i', 498, {
        {142, 1369, M}, {142, 1414, C}, {169, 1445, L}, {197, 1476, C}, {251, 1476, L}, {304, 1476, C},
        {332, 1445, L}, {361, 1414, C}, {361, 1369, L}, {361, 1326, C}, {332, 1295, L}, {304, 1265, C},
        {251, 1265, L}, {197, 1265, C}, {169, 1295, L}, {142, 1326, C}, {142, 1369, L}, {342, 1082, M}, {342, 0, L},
        {156, 0, L}, {156, 1082, L},
    }},
    // m
    {'m', 1796, {
        {574, 946, M}, {392, 946, C}, {325, 793, L}, {325, 0, L}, {139, 0, L}, {139, 1082, L}, {315, 1082, L},
        {320, 964, L}, {437, 1102, C}, {640, 1102, L}, {744, 1102, C}, {825, 1060, L}, {907, 1019, C},
        {950, 928, L}, {1004, 1006, C}, {1090, 1054, L}, {1177, 1102, C}, {1294, 1102, L}, {1468, 1102, C},
        {1562, 1009, L}, {1657, 916, C}, {1657, 711, L}, {1657, 0, L}, {1471, 0, L}, {1471, 713, L}, {1471, 849, C},
        {1408, 897, L}, {1346, 946, C}, {1240, 946, L}, {1128, 946, C}, {1064, 879, L}, {1000, 813, C},
        {990, 718, L}, {990, 0, L}, {805, 0, L}, {805, 712, L}, {805, 839, C}, {742, 892, L}, {679, 946, C},
        {574, 946, L},
    }},
    // e
    {'e', 1086, {
        {997, 189, M}, {944, 109, C}, {847, 44, L}, {750, -20, C}, {590, -20, L}, {364, -20, C}, {228, 127, L},
        {93, 274, C}, {93, 503, L}, {93, 545, L}, {93, 722, C}, {160, 846, L}, {228, 971, C}, {336, 1036, L},
        {444, 1102, C}, {566, 1102, L}, {798, 1102, C}, {904, 950, L}, {1011, 799, C}, {1011, 572, L},
        {1011, 489, L}, {279, 489, L}, {283, 340, C}, {367, 235, L}, {452, 131, C}, {600, 131, L}, {698, 131, C},
        {766, 171, L}, {834, 211, C}, {885, 278, L}, {566, 950, M}, {456, 950, C}, {380, 870, L}, {304, 790, C},
        {285, 640, L}, {826, 640, L}, {826, 654, L}, {819, 762, C}, {763, 856, L}, {708, 950, C}, {566, 950, L},
    }},
    //  
    {' ', 508, {
    }},
};
// clang-format on

struct segment {
    float x0;
    float y0;
    float x1;
    float y1;
};

// in pixels, y downwards from the baseline
std::vector<segment> flatten(const glyph & g, float scale) {
    static constexpr int CURVE_STEPS = 8;

    std::vector<segment> segments;
    float                begin_x = 0, begin_y = 0, x = 0, y = 0;

    auto line_to = [&](float to_x, float to_y) {
        if (to_x != x || to_y != y) {
            segments.push_back({ x, y, to_x, to_y });
        }
        x = to_x;
        y = to_y;
    };
    for (size_t i = 0; i < g.points.size(); i++) {
        const float px = scale * g.points[i].x;
        const float py = -scale * g.points[i].y;
        switch (g.points[i].kind) {
            case M:
                line_to(begin_x, begin_y);
                begin_x = x = px;
                begin_y = y = py;
                break;
            case L:
                line_to(px, py);
                break;
            case C: {
                i++;
                const float end_x = scale * g.points[i].x, end_y = -scale * g.points[i].y, from_x = x, from_y = y;
                for (int step = 1; step <= CURVE_STEPS; step++) {
                    const float t = (float) step / CURVE_STEPS, u = 1 - t;
                    line_to(u * u * from_x + 2 * u * t * px + t * t * end_x, u * u * from_y + 2 * u * t * py + t * t * end_y);
                }
            } break;
        }
    }
    line_to(begin_x, begin_y);
    return segments;
}

// to the outline, negative inside
float distance(const std::vector<segment> & segments, float x, float y) {
    float nearest = FLT_MAX;
    int   winding = 0;
    for (const segment & s : segments) {
        const float ex = s.x1 - s.x0, ey = s.y1 - s.y0, px = x - s.x0, py = y - s.y0;
        const float t  = std::min(std::max((px * ex + py * ey) / (ex * ex + ey * ey), 0.0f), 1.0f);
        const float dx = px - t * ex, dy = py - t * ey;
        nearest = std::min(nearest, dx * dx + dy * dy);
        if ((s.y0 <= y) != (s.y1 <= y)) {
            const bool up   = s.y0 <= y;
            const bool left = ex * py - ey * px > 0;
            winding += up == left ? (up ? 1 : -1) : 0;
        }
    }
    return winding != 0 ? -std::sqrt(nearest) : std::sqrt(nearest);
}

// how much of the pixel around (x, y) is at most `reach` from the glyph
uint8_t coverage(const std::vector<segment> & segments, float x, float y, float reach) {
    static constexpr int SAMPLES = 4;  // in each direction

    const float centre = distance(segments, x, y) - reach;
    if (std::fabs(centre) > 0.75f) {  // further than a corner of the pixel
        return centre < 0 ? 255 : 0;
    }
    int hits = 0;
    for (int i = 0; i < SAMPLES * SAMPLES; i++) {
        const float sx = x - 0.5f + (i % SAMPLES + 0.5f) / SAMPLES, sy = y - 0.5f + (i / SAMPLES + 0.5f) / SAMPLES;
        hits += distance(segments, sx, sy) <= reach;
    }
    return (uint8_t) (255 * hits / (SAMPLES * SAMPLES));
}

}  // namespace

std::string mtmd_timestamp_drawer::text(double seconds) {
    const int whole = (int) seconds;
    char      out[64];
    std::snprintf(out, sizeof(out), "time: %02d:%02d:%05.2f", whole / 3600, whole / 60 % 60, std::fmod(seconds, 60));
    return out;
}

void mtmd_timestamp_drawer::mask::add(const mask & other, int offset) {
    for (int row = 0; row < other.height; row++) {
        for (int column = 0; column < other.width; column++) {
            const int to_x = other.x + offset + column - x, to_y = other.y + row - y;
            if (to_x >= 0 && to_x < width && to_y >= 0 && to_y < height) {
                uint8_t & to = coverage[(size_t) to_y * width + to_x];
                to           = std::max(to, other.coverage[(size_t) row * other.width + column]);
            }
        }
    }
}

void mtmd_timestamp_drawer::mask::blend(clip_image_u8 & frame, uint8_t ink) const {
    for (int row = 0; row < height; row++) {
        for (int column = 0; column < width; column++) {
            const int part = coverage[(size_t) row * width + column];
            if (part > 0) {
                auto rgb = frame.get_pixel(x + column, y + row);
                for (uint8_t & value : rgb) {
                    value = (uint8_t) ((value * (255 - part) + ink * part + 127) / 255);
                }
                frame.set_pixel(x + column, y + row, rgb);
            }
        }
    }
}

const mtmd_timestamp_drawer::glyph_masks & mtmd_timestamp_drawer::get(char c) {
    auto found = masks.find(c);
    if (found != masks.end()) {
        return found->second;
    }
    glyph_masks out;
    for (const glyph & g : GLYPHS) {
        if (g.c != c) {
            continue;
        }
        const float scale = size / FONT_UNITS;
        const int   reach = size / 10;  // of the outline
        const auto  lines = flatten(g, scale);
        out.advance       = scale * g.advance;
        if (!lines.empty()) {
            const int left = -reach - 1, top = -size - reach - 1;
            for (auto [to, limit] : { std::make_pair(&out.fill, 0), std::make_pair(&out.outline, reach) }) {
                *to = mask(left, top, (int) out.advance + 2 * reach + 3, size + size / 4 + 2 * reach + 2);
                for (int i = 0; i < to->width * to->height; i++) {
                    to->coverage[i] = coverage(lines, left + i % to->width + 0.5f, top + i / to->width + 0.5f, limit);
                }
            }
        }
    }
    return masks[c] = out;
}

void mtmd_timestamp_drawer::draw(clip_image_u8 & frame, const std::string & text) {
    const auto frame_size = frame.get_size();
    const int  font_size  = std::min(frame_size.width, frame_size.height) / 10;
    if (frame.is_placeholder() || font_size == 0) {
        return;
    }
    if (font_size != size) {
        size = font_size;
        masks.clear();
    }
    const int baseline = (int) std::ceil(size * FONT_ASCENT / FONT_UNITS);

    mask  fill(0, 0, frame_size.width, std::min(2 * size, frame_size.height));
    mask  outline = fill;
    float pen     = 0;
    for (char c : text) {
        glyph_masks glyph = get(c);
        glyph.fill.y += baseline;
        glyph.outline.y += baseline;
        fill.add(glyph.fill, (int) std::round(pen));
        outline.add(glyph.outline, (int) std::round(pen));
        pen += glyph.advance;
    }
    if (size / 10 > 0) {
        outline.blend(frame, 255);
    }
    fill.blend(frame, 0);
}
