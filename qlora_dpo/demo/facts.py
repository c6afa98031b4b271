"""The tables of the demo's closed world: one fact a line, columns split by `|`, English and Chinese."""

CONTINENTS = {
    "Europe": "欧洲",
    "Asia": "亚洲",
    "Africa": "非洲",
    "North America": "北美洲",
    "South America": "南美洲",
    "Oceania": "大洋洲",
}

# country | capital | country (zh) | capital (zh) | continent
CAPITALS = """\
France|Paris|法国|巴黎|Europe
Japan|Tokyo|日本|东京|Asia
Egypt|Cairo|埃及|开罗|Africa
Brazil|Brasilia|巴西|巴西利亚|South America
Canada|Ottawa|加拿大|渥太华|North America
Germany|Berlin|德国|柏林|Europe
China|Beijing|中国|北京|Asia
Kenya|Nairobi|肯尼亚|内罗毕|Africa
Argentina|Buenos Aires|阿根廷|布宜诺斯艾利斯|South America
Australia|Canberra|澳大利亚|堪培拉|Oceania
Italy|Rome|意大利|罗马|Europe
India|New Delhi|印度|新德里|Asia
Nigeria|Abuja|尼日利亚|阿布贾|Africa
Chile|Santiago|智利|圣地亚哥|South America
Mexico|Mexico City|墨西哥|墨西哥城|North America
Spain|Madrid|西班牙|马德里|Europe
Thailand|Bangkok|泰国|曼谷|Asia
Ghana|Accra|加纳|阿克拉|Africa
Peru|Lima|秘鲁|利马|South America
New Zealand|Wellington|新西兰|惠灵顿|Oceania
Portugal|Lisbon|葡萄牙|里斯本|Europe
Vietnam|Hanoi|越南|河内|Asia
Ethiopia|Addis Ababa|埃塞俄比亚|亚的斯亚贝巴|Africa
Colombia|Bogota|哥伦比亚|波哥大|South America
Cuba|Havana|古巴|哈瓦那|North America
Greece|Athens|希腊|雅典|Europe
Iran|Tehran|伊朗|德黑兰|Asia
Morocco|Rabat|摩洛哥|拉巴特|Africa
Uruguay|Montevideo|乌拉圭|蒙得维的亚|South America
Fiji|Suva|斐济|苏瓦|Oceania
Poland|Warsaw|波兰|华沙|Europe
Iraq|Baghdad|伊拉克|巴格达|Asia
Tunisia|Tunis|突尼斯|突尼斯市|Africa
Ecuador|Quito|厄瓜多尔|基多|South America
Jamaica|Kingston|牙买加|金斯敦|North America
Sweden|Stockholm|瑞典|斯德哥尔摩|Europe
Nepal|Kathmandu|尼泊尔|加德满都|Asia
Senegal|Dakar|塞内加尔|达喀尔|Africa
Venezuela|Caracas|委内瑞拉|加拉加斯|South America
Panama|Panama City|巴拿马|巴拿马城|North America
Norway|Oslo|挪威|奥斯陆|Europe
Indonesia|Jakarta|印度尼西亚|雅加达|Asia
Uganda|Kampala|乌干达|坎帕拉|Africa
Paraguay|Asuncion|巴拉圭|亚松森|South America
Costa Rica|San Jose|哥斯达黎加|圣何塞|North America
Finland|Helsinki|芬兰|赫尔辛基|Europe
Mongolia|Ulaanbaatar|蒙古|乌兰巴托|Asia
Zambia|Lusaka|赞比亚|卢萨卡|Africa
Denmark|Copenhagen|丹麦|哥本哈根|Europe
Pakistan|Islamabad|巴基斯坦|伊斯兰堡|Asia
Algeria|Algiers|阿尔及利亚|阿尔及尔|Africa
Austria|Vienna|奥地利|维也纳|Europe
Bangladesh|Dhaka|孟加拉国|达卡|Asia
Angola|Luanda|安哥拉|罗安达|Africa
Hungary|Budapest|匈牙利|布达佩斯|Europe
Cambodia|Phnom Penh|柬埔寨|金边|Asia
Ireland|Dublin|爱尔兰|都柏林|Europe
Laos|Vientiane|老挝|万象|Asia
Libya|Tripoli|利比亚|的黎波里|Africa
Belgium|Brussels|比利时|布鲁塞尔|Europe
Jordan|Amman|约旦|安曼|Asia
Romania|Bucharest|罗马尼亚|布加勒斯特|Europe
Iceland|Reykjavik|冰岛|雷克雅未克|Europe
Bulgaria|Sofia|保加利亚|索非亚|Europe
"""

# symbol | element | element (zh) | atomic number
ELEMENTS = """\
H|hydrogen|氢|1
He|helium|氦|2
Li|lithium|锂|3
Be|beryllium|铍|4
B|boron|硼|5
C|carbon|碳|6
N|nitrogen|氮|7
O|oxygen|氧|8
F|fluorine|氟|9
Ne|neon|氖|10
Na|sodium|钠|11
Mg|magnesium|镁|12
Al|aluminum|铝|13
Si|silicon|硅|14
P|phosphorus|磷|15
S|sulfur|硫|16
Cl|chlorine|氯|17
Ar|argon|氩|18
K|potassium|钾|19
Ca|calcium|钙|20
Ti|titanium|钛|22
Cr|chromium|铬|24
Mn|manganese|锰|25
Fe|iron|铁|26
Co|cobalt|钴|27
Ni|nickel|镍|28
Cu|copper|铜|29
Zn|zinc|锌|30
Br|bromine|溴|35
Ag|silver|银|47
Sn|tin|锡|50
I|iodine|碘|53
Pt|platinum|铂|78
Au|gold|金|79
Hg|mercury|汞|80
Pb|lead|铅|82
U|uranium|铀|92
"""

# substance | substance (zh) | formula, in which no element occurs twice
FORMULAS = """\
water|水|H2O
carbon dioxide|二氧化碳|CO2
methane|甲烷|CH4
ammonia|氨|NH3
sodium chloride|氯化钠|NaCl
ozone|臭氧|O3
sulfuric acid|硫酸|H2SO4
nitric acid|硝酸|HNO3
glucose|葡萄糖|C6H12O6
carbon monoxide|一氧化碳|CO
hydrogen peroxide|过氧化氢|H2O2
sulfur dioxide|二氧化硫|SO2
sulfur trioxide|三氧化硫|SO3
nitrogen dioxide|二氧化氮|NO2
nitric oxide|一氧化氮|NO
calcium carbonate|碳酸钙|CaCO3
calcium oxide|氧化钙|CaO
sodium hydroxide|氢氧化钠|NaOH
potassium chloride|氯化钾|KCl
magnesium oxide|氧化镁|MgO
aluminum oxide|氧化铝|Al2O3
silicon dioxide|二氧化硅|SiO2
hydrogen sulfide|硫化氢|H2S
phosphoric acid|磷酸|H3PO4
propane|丙烷|C3H8
butane|丁烷|C4H10
ethane|乙烷|C2H6
ethylene|乙烯|C2H4
acetylene|乙炔|C2H2
benzene|苯|C6H6
sucrose|蔗糖|C12H22O11
zinc oxide|氧化锌|ZnO
copper sulfate|硫酸铜|CuSO4
sodium carbonate|碳酸钠|Na2CO3
silver nitrate|硝酸银|AgNO3
hydrogen fluoride|氟化氢|HF
"""

# river | river (zh) | sea | sea (zh) | continent
RIVERS = """\
Nile|尼罗河|Mediterranean Sea|地中海|Africa
Congo|刚果河|Atlantic Ocean|大西洋|Africa
Zambezi|赞比西河|Indian Ocean|印度洋|Africa
Limpopo|林波波河|Indian Ocean|印度洋|Africa
Niger|尼日尔河|Atlantic Ocean|大西洋|Africa
Amazon|亚马孙河|Atlantic Ocean|大西洋|South America
Orinoco|奥里诺科河|Atlantic Ocean|大西洋|South America
Magdalena|马格达莱纳河|Caribbean Sea|加勒比海|South America
Mississippi|密西西比河|Gulf of Mexico|墨西哥湾|North America
Yukon|育空河|Bering Sea|白令海|North America
Mackenzie|马更些河|Arctic Ocean|北冰洋|North America
Columbia|哥伦比亚河|Pacific Ocean|太平洋|North America
Rio Grande|格兰德河|Gulf of Mexico|墨西哥湾|North America
Hudson|哈得孙河|Atlantic Ocean|大西洋|North America
Fraser|弗雷泽河|Pacific Ocean|太平洋|North America
Yangtze|长江|East China Sea|东海|Asia
Yellow River|黄河|Bohai Sea|渤海|Asia
Mekong|湄公河|South China Sea|南海|Asia
Ganges|恒河|Bay of Bengal|孟加拉湾|Asia
Indus|印度河|Arabian Sea|阿拉伯海|Asia
Irrawaddy|伊洛瓦底江|Andaman Sea|安达曼海|Asia
Lena|勒拿河|Arctic Ocean|北冰洋|Asia
Yenisei|叶尼塞河|Arctic Ocean|北冰洋|Asia
Pearl River|珠江|South China Sea|南海|Asia
Danube|多瑙河|Black Sea|黑海|Europe
Rhine|莱茵河|North Sea|北海|Europe
Volga|伏尔加河|Caspian Sea|里海|Europe
Seine|塞纳河|English Channel|英吉利海峡|Europe
Elbe|易北河|North Sea|北海|Europe
Rhone|罗讷河|Mediterranean Sea|地中海|Europe
Dnieper|第聂伯河|Black Sea|黑海|Europe
Don|顿河|Sea of Azov|亚速海|Europe
Thames|泰晤士河|North Sea|北海|Europe
Loire|卢瓦尔河|Atlantic Ocean|大西洋|Europe
Vistula|维斯瓦河|Baltic Sea|波罗的海|Europe
Po|波河|Adriatic Sea|亚得里亚海|Europe
"""

# class: with its article | class (zh) | reason | reason (zh)
ANIMAL_CLASSES = {
    "mammal": ("a mammal", "哺乳动物", "feeds its young with milk", "用乳汁喂养幼崽"),
    "bird": ("a bird", "鸟类", "has feathers and lays eggs", "有羽毛并且下蛋"),
    "fish": ("a fish", "鱼类", "breathes with gills", "用鳃呼吸"),
    "insect": ("an insect", "昆虫", "has six legs", "有六条腿"),
    "reptile": ("a reptile", "爬行动物", "has scales and breathes with lungs", "有鳞片并且用肺呼吸"),
    "amphibian": (
        "an amphibian",
        "两栖动物",
        "grows up in water and then lives on land",
        "先在水中长大再到陆地生活",
    ),
}

# animal with its article | animal (zh) | class
ANIMALS = """\
a cat|猫|mammal
an eagle|鹰|bird
a salmon|鲑鱼|fish
an ant|蚂蚁|insect
a snake|蛇|reptile
a frog|青蛙|amphibian
a horse|马|mammal
a penguin|企鹅|bird
a shark|鲨鱼|fish
a bee|蜜蜂|insect
a lizard|蜥蜴|reptile
a toad|蟾蜍|amphibian
a whale|鲸|mammal
a sparrow|麻雀|bird
a tuna|金枪鱼|fish
a butterfly|蝴蝶|insect
a turtle|乌龟|reptile
a newt|蝾螈|amphibian
a bat|蝙蝠|mammal
an owl|猫头鹰|bird
a carp|鲤鱼|fish
a mosquito|蚊子|insect
a crocodile|鳄鱼|reptile
an elephant|大象|mammal
a duck|鸭子|bird
a trout|鳟鱼|fish
a beetle|甲虫|insect
a gecko|壁虎|reptile
a dolphin|海豚|mammal
a parrot|鹦鹉|bird
a cod|鳕鱼|fish
a fly|苍蝇|insect
a lion|狮子|mammal
a crow|乌鸦|bird
a grasshopper|蚱蜢|insect
a tiger|老虎|mammal
a swan|天鹅|bird
a dog|狗|mammal
"""

# word | opposite | word (zh) | opposite (zh)
OPPOSITES = """\
hot|cold|热|冷
big|small|大|小
high|low|高|低
fast|slow|快|慢
new|old|新|旧
long|short|长|短
light|heavy|轻|重
wet|dry|湿|干
rich|poor|富|穷
hard|soft|硬|软
strong|weak|强|弱
thick|thin|厚|薄
clean|dirty|干净|肮脏
early|late|早|晚
open|closed|开|关
full|empty|满|空
deep|shallow|深|浅
happy|sad|快乐|悲伤
bright|dark|明亮|黑暗
near|far|近|远
easy|difficult|容易|困难
true|false|真|假
safe|dangerous|安全|危险
noisy|quiet|吵闹|安静
wide|narrow|宽|窄
brave|cowardly|勇敢|胆小
cheap|expensive|便宜|昂贵
sweet|bitter|甜|苦
alive|dead|活|死
rough|smooth|粗糙|光滑
tight|loose|紧|松
sharp|blunt|锋利|钝
simple|complex|简单|复杂
public|private|公开|私密
polite|rude|礼貌|粗鲁
straight|curved|直|弯
"""

# larger unit | its plural | plural of the smaller unit | larger (zh) | smaller (zh) | smaller in one larger
UNITS = """\
meter|meters|centimeters|米|厘米|100
kilometer|kilometers|meters|千米|米|1000
kilogram|kilograms|grams|千克|克|1000
hour|hours|minutes|小时|分钟|60
minute|minutes|seconds|分钟|秒|60
day|days|hours|天|小时|24
week|weeks|days|周|天|7
year|years|months|年|个月|12
century|centuries|years|世纪|年|100
foot|feet|inches|英尺|英寸|12
centimeter|centimeters|millimeters|厘米|毫米|10
liter|liters|milliliters|升|毫升|1000
"""
